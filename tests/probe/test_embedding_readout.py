"""The artefact of a judged probe: vectors, saving, the card, the hub."""

import pytest
import torch

from cenote.probe import EmbeddingReadout
from cenote.probe.embedding_readout import EmbeddingConfig
from cenote.types import Features


def make(pooling="simpool", **settings):
    chosen = {"dim": 8, "layers": (2,), "tokens": "both", "task": "similarity", "backbone": "hf:someone/encoder"}
    torch.manual_seed(0)
    readout = EmbeddingReadout(EmbeddingConfig(pooling, **{**chosen, **settings}))
    with torch.no_grad():
        for parameter in readout.parameters():
            parameter.add_(torch.randn_like(parameter))
    return readout


def some_features():
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return Features(torch.randn(2, 2, 5, 8), mask, (1, 2))


@pytest.mark.parametrize("settings", [{}, {"standardise": True}, {"pooling": "mean_layers > mean", "layers": (1, 2)}])
def test_saved_and_loaded_gives_the_same_unit_vectors(settings, tmp_path):
    readout = make(**settings)
    if readout.norm is not None:
        readout.norm.running_mean.normal_()
    features = some_features()
    vectors = readout(features)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    again = EmbeddingReadout.from_pretrained(readout.save_pretrained(tmp_path / "best"))
    torch.testing.assert_close(again(features), vectors)


def test_card_says_what_it_is_and_how_to_load_it(tmp_path):
    readout = make(data="stsb", metric="Spearman correlation", score=0.8629, backbone_options={"max_length": 256})
    card = (readout.save_pretrained(tmp_path) / "README.md").read_text()
    assert "# simpool on hf:someone/encoder" in card
    assert "judged by similarity: Spearman correlation 0.8629" in card
    assert "backbone = load_backbone('hf:someone/encoder', max_length=256)" in card
    assert card.startswith("---\n")
    assert 'base_model: "someone/encoder"' in card


def test_goes_to_the_hub_as_one_commit(monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token):
            sent["token"] = token

        def create_repo(self, repo_id, **_):
            return f"hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            from pathlib import Path

            sent["files"] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert make().push_to_hub("someone/vectors", token="secret") == "hub/someone/vectors"
    assert sent == {"token": "secret", "files": ["README.md", "config.json", "model.safetensors"]}


def test_other_configurations_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="embedding readout"):
        EmbeddingReadout.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no readout at"):
        EmbeddingReadout.from_pretrained(tmp_path / "missing")
