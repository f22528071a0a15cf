"""A trained readout: what it computes, and that it comes back from its files."""

import json
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from cenote.probe.artefact import ENCODER_POOLER
from cenote.probe.readout import Readout, ReadoutConfig
from cenote.types import Features, Grid
from probe.models import PatchBackbone, make_readout


def features(batch=5, layers=(1, 2), tokens=5, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, len(layers), tokens, dim, generator=generator)
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[0, 3:] = False
    return Features(hidden, mask, layers, Grid(2, 2), 1, torch.randn(batch, dim, generator=generator))


SPECS = [
    ("mean", {}),
    ("efficient_probing(num_queries=2)", {}),
    ("efficient_probing", {"options": {"num_queries": 4}, "tokens": "both"}),
    ("weighted_layers > efficient_probing(num_queries=2)", {"layers": (1, 2)}),
    ("concat_layers > mean", {"layers": (2, 1), "tokens": "class"}),
    (ENCODER_POOLER, {"tokens": "both"}),
    ("mean", {"task": "regression", "outputs": 1, "classes": (), "target_mean": 40.0, "target_std": 7.0}),
    ("mean", {"task": "multilabel", "norm_eps": 0.0}),
]


@pytest.mark.parametrize(("pooling", "changes"), SPECS)
def test_files_bring_back_the_same_readout(tmp_path, pooling, changes):
    readout = make_readout(PatchBackbone(), pooling, **changes)
    readout.save_pretrained(tmp_path / "best")
    assert sorted(os.listdir(tmp_path / "best")) == ["README.md", "config.json", "model.safetensors"]
    again = Readout.from_pretrained(tmp_path / "best")
    assert again.config == readout.config
    assert not again.training
    batch = features()
    torch.testing.assert_close(again(batch), readout(batch), rtol=0, atol=0)


def test_scores_are_the_stated_formula():
    readout, batch = make_readout(PatchBackbone(), "mean"), features()
    mask = batch.mask[:, 1:].float()
    mean = (batch.hidden[:, 1, 1:] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    standard = (mean - readout.norm.running_mean) / (readout.norm.running_var + 1e-6).sqrt()
    expected = standard @ readout.head.weight.T + readout.head.bias
    torch.testing.assert_close(readout(batch), expected)
    torch.testing.assert_close(readout.predict_proba(batch), expected.softmax(-1))


def test_layers_are_found_by_number_not_by_place():
    stack = make_readout(PatchBackbone(), "concat_layers > mean", layers=(2, 1))
    last = make_readout(PatchBackbone(), "mean", layers=(2,))
    batch = features(layers=(0, 2, 1))
    swapped = Features(batch.hidden[:, [2, 1, 0]], batch.mask, (1, 2, 0), batch.grid, batch.prefix)
    for readout in (stack, last):
        torch.testing.assert_close(readout(batch), readout(swapped))
    with pytest.raises(ValueError, match=r"hidden state\(s\) \[2\], but the features hold \[1\]"):
        last(features(layers=(1,)))


def test_padding_does_not_matter():
    readout = make_readout(PatchBackbone())
    batch = features()
    hidden = torch.cat([batch.hidden, torch.full((5, 2, 3, 4), 1e6)], dim=2)
    padded = Features(
        hidden, torch.cat([batch.mask, torch.zeros(5, 3, dtype=torch.bool)], 1), batch.layers, batch.grid, 1
    )
    torch.testing.assert_close(readout(padded), readout(batch))


def test_tasks_give_their_own_outputs():
    batch = features()
    regression = make_readout(
        PatchBackbone(), "mean", task="regression", outputs=1, classes=(), target_mean=40.0, target_std=7.0
    )
    plain = make_readout(PatchBackbone(), "mean", task="regression", outputs=1, classes=())
    torch.testing.assert_close(regression(batch), 40 + 7 * plain(batch))
    with pytest.raises(ValueError, match="no class probabilities"):
        regression.predict_proba(batch)
    multilabel = make_readout(PatchBackbone(), "mean", task="multilabel")
    torch.testing.assert_close(multilabel.predict_proba(batch), multilabel(batch).sigmoid())


def test_weights_are_the_attention():
    readout, batch = make_readout(PatchBackbone()), features()
    weights = readout.weights(batch)
    assert weights.shape == (5, 2, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 2))
    assert (weights[0, :, 2:] == 0).all()
    with pytest.raises(ValueError, match="does not attend"):
        make_readout(PatchBackbone(), "mean").weights(batch)
    with pytest.raises(ValueError, match="no attention weights"):
        make_readout(PatchBackbone(), ENCODER_POOLER).weights(batch)


def test_encoder_pooler_needs_a_pooled_output():
    batch = features()
    bare = Features(batch.hidden, batch.mask, batch.layers)
    with pytest.raises(ValueError, match="pooled output"):
        make_readout(PatchBackbone(), ENCODER_POOLER)(bare)


def test_given_parts_must_fit():
    config = make_readout(PatchBackbone()).config
    with pytest.raises(ValueError, match="head is 5 to 3"):
        Readout(config, head=nn.Linear(5, 3))
    with pytest.raises(ValueError, match="norm_eps"):
        Readout(config, norm=nn.BatchNorm1d(4, affine=False))
    assert not any(module.training for module in Readout(config).modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers": ()}, "at least one layer"), ({"outputs": 2}, "as many class names")],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_readout(PatchBackbone(), **change)


@pytest.mark.compiled  # elsewhere the run-time checks of the tests are faster than the library's own
@pytest.mark.parametrize(
    ("change", "message"), [({"task": "ranking"}, "task must be"), ({"tokens": "all"}, "tokens must be")]
)
def test_unknown_words_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_readout(PatchBackbone(), **change)


def test_another_backbone_is_refused():
    readout = make_readout(PatchBackbone())
    readout.check_backbone(PatchBackbone())
    with pytest.raises(ValueError, match="trained on fake:image with fingerprint"):
        readout.check_backbone(PatchBackbone(weights=7))
    unknown = make_readout(PatchBackbone(), backbone_fingerprint="")
    unknown.check_backbone(PatchBackbone(weights=7))
    wide = PatchBackbone()
    wide.dim = 6
    with pytest.raises(ValueError, match="width 4"):
        readout.check_backbone(wide)


def damage(folder, what):
    config, weights = folder / "config.json", folder / "model.safetensors"
    if what == "no weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-20])
    elif what == "other weights":
        save_file({**load_file(weights), "head.bias": torch.zeros(8)}, weights)
    elif what == "foreign":
        config.write_text('{"model_type": "bert"}')
    elif what == "no json":
        config.write_text("{")
    elif what == "newer":
        config.write_text(json.dumps({**json.loads(config.read_text()), "format": 99}))
    elif what == "unknown pooling":
        config.write_text(json.dumps({**json.loads(config.read_text()), "pooling": "eficient_probing"}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no weights", "model.safetensors is missing"),
        ("truncated", "does not hold the weights"),
        ("other weights", "does not hold the weights"),
        ("foreign", "does not describe a readout"),
        ("no json", "does not describe a readout"),
        ("newer", "format 99"),
        ("unknown pooling", "did you mean efficient_probing"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, what, message):
    make_readout(PatchBackbone()).save_pretrained(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(ValueError, match=message):
        Readout.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "/no/such/folder", "a/b/c"])
def test_missing_folder_is_refused_without_asking_the_hub(source, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kw: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="no readout at"):
        Readout.from_pretrained(source)


def test_hub_ids_are_downloaded_at_their_revision(tmp_path, monkeypatch):
    import huggingface_hub

    readout, asked = make_readout(PatchBackbone()), []
    readout.save_pretrained(tmp_path)

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    again = Readout.from_pretrained("someone/readout", revision="v2")
    assert asked == [("someone/readout", "config.json", "v2"), ("someone/readout", "model.safetensors", "v2")]
    torch.testing.assert_close(again(features()), readout(features()))


def test_hub_errors_become_one_line(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*args, **kw):
        raise LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match=r"no readout could be had from the hub: offline$"):
        Readout.from_pretrained("someone/readout")


def test_push_uploads_the_saved_files(monkeypatch):
    import huggingface_hub

    uploaded = {}

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert exist_ok
            return f"hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded[repo_id] = sorted(os.listdir(folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert make_readout(PatchBackbone()).push_to_hub("someone/readout", token="secret") == "hub/someone/readout"
    assert uploaded == {"someone/readout": ["README.md", "config.json", "model.safetensors"]}


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    old = make_readout(PatchBackbone(), seed=1)
    old.save_pretrained(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make_readout(PatchBackbone(), seed=2).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    torch.testing.assert_close(Readout.from_pretrained(tmp_path)(features()), old(features()))


def test_an_interrupted_rename_leaves_no_mixture(tmp_path, monkeypatch):
    make_readout(PatchBackbone(), seed=1).save_pretrained(tmp_path)
    real, done = os.replace, []

    def replace(source, target):
        if done:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        make_readout(PatchBackbone(), seed=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        Readout.from_pretrained(tmp_path)


def test_card_has_the_table_and_how_to_load(tmp_path):
    table = tuple(
        {
            "readout": f"r{k}",
            "layers": "2",
            "tokens": "patches",
            "score": 0.9 - k / 100,
            "ci_low": 0.8,
            "ci_high": float("nan"),
            "params": 1234,
            "macs": 10,
            "latency_ms": 0.01,
            "tie_group": 1,
            "metric": "accuracy",
        }
        for k in range(25)
    )
    readout = make_readout(
        PatchBackbone(),
        backbone="hf:some/model",
        revision="abc",
        backbone_options={"bidirectional": True},
        table=table,
        data="a|b",
        classes=("x | y", "<i>", "z"),
    )
    readout.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    head = card.split("---\n")[1]
    assert 'library_name: "cenote"' in head
    assert 'base_model: "some/model"' in head
    assert "load_backbone('hf:some/model', revision='abc', bidirectional=True)" in card
    assert "| r0 | 2 | patches | 0.9000 | 0.8000 to – | 1,234 | 10 | 0.0100 | 1 |" in card
    assert "r19" in card
    assert "r20" not in card
    assert "and 5 more" in card
    assert "x \\| y, &lt;i>, z" in card
    assert Readout.from_pretrained(tmp_path).config.table[3]["readout"] == "r3"


def test_config_survives_json():
    config = make_readout(
        PatchBackbone(), layers=(1, 2), pooling="weighted_layers > mean", options={"num_layers": 2}
    ).config
    assert ReadoutConfig.from_json(config.to_json()) == config
    assert isinstance(ReadoutConfig.from_json(config.to_json()).grid, Grid)


def test_whole_path_from_image_to_scores():
    backbone = PatchBackbone()
    readout = make_readout(backbone)
    image = Image.new("L", (8, 8), 200)
    scores = readout(backbone(backbone.collate([image, image]), readout.config.layers))
    torch.testing.assert_close(scores[0], scores[1])
