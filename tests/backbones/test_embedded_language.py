"""The shipped language model: small, loadable, reads English and looks facts up; its training resumes exactly."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cenote.backbones.embedded_language import (
    HELD_OUT_DESCRIPTIONS,
    NAMES,
    SHIPPED,
    description,
    description_names,
    evaluation_text,
    load_embedded_language,
    save_embedded_language,
    training_descriptions,
)
from cenote.worlds.planted_facts import PlantedFacts, accuracy, generation_accuracy

PERPLEXITY = 48.0  # of the held-out descriptions
FOUND = [(256, 16, 0.9), (1024, 8, 0.75), (2048, 4, 0.5)]  # length, documents a depth, least share of answers
TOOL = Path(__file__).parents[2] / "tools" / "train_embedded_language.py"


@pytest.fixture(scope="module")
def loaded():
    return load_embedded_language()


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_embedded_language", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_shipped_files_are_small():
    assert (
        sum(file.stat().st_size for file in SHIPPED.parent.glob("embedded_language*.*") if file.suffix != ".py") < 2e6
    )


def test_is_an_ordinary_llama(loaded):
    model, tokenizer = loaded
    assert type(model) is LlamaForCausalLM
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (8, 96, 6)
    assert (config.num_key_value_heads, config.max_position_embeddings) == (3, 2048)
    assert len(tokenizer) == config.vocab_size == 1024
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())


def test_dtype(loaded):
    half = load_embedded_language(dtype=torch.bfloat16)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.norm.weight, loaded[0].model.norm.weight.bfloat16())


def test_tokenizer_gives_every_text_back(loaded):
    tokenizer = loaded[1]
    for text in (
        evaluation_text(),
        "Ünïcode “quotes”, 日本, 1851-07-04 and  two spaces\n\ttab",
        " The number of Yorick is 0042.",
    ):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert all(len(tokenizer.encode(f" {name}", add_special_tokens=False)) == 1 for name in NAMES)
    assert tokenizer.pad_token_id not in (None, tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_pads_on_the_left(loaded):
    batch = loaded[1](["a long text in front", "short"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][1, 0] == 0
    assert batch["attention_mask"][:, -1].all()


def test_descriptions_are_split():
    assert set(HELD_OUT_DESCRIPTIONS) < set(description_names())
    for name in description_names():
        assert (description(name) in evaluation_text()) == (name in HELD_OUT_DESCRIPTIONS)
        assert (description(name) in training_descriptions()) == (name not in HELD_OUT_DESCRIPTIONS)


@torch.no_grad()
def test_predicts_held_out_text(loaded):
    model, tokenizer = loaded
    ids = torch.tensor(tokenizer.encode(evaluation_text(), add_special_tokens=False)[: 10 * 511]).view(10, 511)
    ids = torch.cat([torch.full((10, 1), tokenizer.bos_token_id), ids], 1)
    loss = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert math.exp(loss) < PERPLEXITY


@pytest.mark.parametrize(("length", "documents", "bound"), FOUND)
def test_finds_planted_facts_at_every_depth(loaded, length, documents, bound):
    model, tokenizer = loaded
    grid = PlantedFacts(tokenizer).grid(documents, length, (0.0, 0.5, 1.0), seed=11)
    found = {depth: accuracy(model, batch) for depth, batch in grid.items()}
    assert min(found.values()) >= bound, found
    assert all(accuracy(model, batch) > 3 * batch.chance for batch in grid.values())


def test_finds_planted_facts_when_generating(loaded):
    model, tokenizer = loaded
    batch = PlantedFacts(tokenizer).batch(8, 300, seed=12)
    assert generation_accuracy(model, batch) == accuracy(model, batch) > 0.7


def test_answers_come_from_the_text(loaded):
    """With another number written over the asked fact's, the answer follows."""
    model, tokenizer = loaded
    batch = PlantedFacts(tokenizer).batch(8, 300, 4, seed=13)
    other = torch.tensor(tokenizer.encode(" 7719", add_special_tokens=False)).expand(8, -1)
    place = batch.fact_positions.gather(1, batch.asked) + batch.question_lengths + torch.arange(2)
    ids = batch.input_ids.scatter(1, place, other)
    first = model(ids).logits[:, batch.answer_positions[0, 0, 0] - 1].argmax(-1)
    assert (first == other[:, 0]).float().mean() > 0.8


def test_saved_models_load_again(loaded, tmp_path):
    model, tokenizer = loaded
    save_embedded_language(model, tokenizer, tmp_path)
    assert (tmp_path / SHIPPED.name).read_bytes() == SHIPPED.read_bytes()
    again, other = load_embedded_language(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert other.encode("The whale, 1851.") == tokenizer.encode("The whale, 1851.")


def test_wrong_files_are_refused(loaded, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*nowhere"):
        load_embedded_language(tmp_path / "nowhere.safetensors")
    save_embedded_language(*loaded, tmp_path)
    weights, settings = tmp_path / SHIPPED.name, tmp_path / "embedded_language.json"
    good = settings.read_text()
    for bad in ("{", "[]", "{}", good.replace('"num_hidden_layers":8', '"num_hidden_layers":9')):
        settings.write_text(bad)
        with pytest.raises(ValueError, match="do not hold an embedded language model"):
            load_embedded_language(tmp_path)
    settings.write_text(good)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="do not hold an embedded language model"):
        load_embedded_language(weights)


@pytest.fixture
def small(tool):
    stages = (tool.Stage(0.5, (64,), 0.5, 0.5), tool.Stage(0.5, (128,)))
    sizes = {"vocab": 512, "hidden": 32, "layers": 4, "heads": 2, "key_value_heads": 1, "mlp": 32, "context": 128}
    settings = tool.Settings(steps=6, tokens_per_step=256, stages=stages, warmup=2, long_steps=0, **sizes)
    novels = [training_descriptions()]
    tokenizer = tool.train_tokenizer(novels, settings.vocab)
    return settings, tool.make_corpus(novels, [evaluation_text()], tokenizer), tokenizer


def test_training_resumes_to_the_same_weights(tool, small, tmp_path, capsys):
    through = tool.train(*small, tmp_path / "a", tmp_path / "a" / "model.safetensors")
    tool.train(*small, tmp_path / "b", tmp_path / "b" / "model.safetensors", stop_after=3)
    resumed = tool.train(*small, tmp_path / "b", tmp_path / "b" / "model.safetensors")
    for (name, a), b in zip(through.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    start = tool.make_model(small[0], small[2])
    assert not torch.equal(start.model.embed_tokens.weight, through.model.embed_tokens.weight)
    shipped, _ = load_embedded_language(tmp_path / "a" / "model.safetensors")
    assert torch.equal(shipped.model.norm.weight, through.model.norm.weight.half().float())
    with pytest.raises(SystemExit, match="other settings"):
        tool.train(replace(small[0], lr=1e-4), *small[1:], tmp_path / "a", tmp_path / "a" / "model.safetensors")


def test_training_documents_are_decided_by_seed_and_step(tool, small):
    settings, corpus, tokenizer = small
    world = PlantedFacts(tokenizer, corpus.novels)
    (first, weights), (again, _), (other, _) = (tool.make_batch(settings, corpus, world, step) for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape == other.shape == weights.shape == (4, 64)
    assert not torch.equal(first, other)
    assert set(weights.unique().tolist()) <= {0.0, 1.0, settings.answer_weight}
    assert tool.make_batch(settings, corpus, world, 5)[0].shape == (2, 128)


def test_start_looks_the_token_before_up(tool, loaded):
    """The look-up that training starts from: layer 0 looks 1, 2 and 3 back, the next knows where a question stood."""
    settings = tool.Settings()
    model = tool.make_model(settings, loaded[1]).eval()
    model.set_attn_implementation("eager")
    batch = PlantedFacts(loaded[1]).batch(8, 128, 7, None, 7, seed=1)
    with torch.no_grad():
        attentions = model(batch.input_ids, output_attentions=True).attentions
    for head in range(6):
        back = head // 2 + 1
        assert attentions[0][:, head, 40:].diagonal(40 - back, 1, 2).mean() > 0.6
    rows = torch.arange(8)[:, None]
    source = batch.fact_positions.gather(1, batch.asked) + batch.question_lengths
    found = attentions[settings.lookup_layers[0]][rows, 2, batch.answer_positions[..., 0] - 1, source]
    assert found.mean() > 0.2  # 0.01 by chance


def test_no_novels(tool, tmp_path):
    with pytest.raises(SystemExit, match="no novels"):
        tool.read_novels(tmp_path)
