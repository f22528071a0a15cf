"""Poolings through PyTorchModelHubMixin."""

import json

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin

from cenote.integrations.hub import HubPooling


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("efficient_probing(num_queries=4)", {}),
        ("weighted_layers > simpool", {"num_layers": 3}),
        ("spp", {"grid": (2, 3), "levels": [2, 1]}),
    ],
)
def test_saved_and_loaded_gives_the_same_vectors(spec, options, tmp_path):
    torch.manual_seed(0)
    model = HubPooling(spec, dim=24, options=options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    if any(True for _ in model.parameters()):
        assert (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "config.json").read_text())["spec"] == spec
    assert not list(tmp_path.glob("*.bin"))
    tokens = torch.randn(2, *((3,) if ">" in spec else ()), 6, 24)
    torch.testing.assert_close(HubPooling.from_pretrained(tmp_path)(tokens), model(tokens))


def test_goes_to_the_hub_by_the_mixins_own_method(tmp_path, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, folder_path, repo_id, **_):
            sent[repo_id] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    HubPooling("gem", dim=4).push_to_hub("someone/gem")
    assert sent == {"someone/gem": ["README.md", "config.json", "model.safetensors"]}
    assert HubPooling.push_to_hub is PyTorchModelHubMixin.push_to_hub


def test_a_wrong_name_is_refused():
    with pytest.raises(ValueError, match="did you mean"):
        HubPooling("simpol", dim=4)
