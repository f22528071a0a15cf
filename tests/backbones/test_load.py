import subprocess
import sys

import pytest

from backbones.hosts import save_text
from cenote.backbones import load_backbone
from cenote.backbones.load import split_spec


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("embedded", ("embedded", "")),
        ("embedded:runs/a.safetensors", ("embedded", "runs/a.safetensors")),
        ("hf:org/name", ("hf", "org/name")),
        ("bert-base-uncased", ("hf", "bert-base-uncased")),
        ("./folder", ("hf", "./folder")),
        ("timm:hf-hub:org/name", ("timm", "hf-hub:org/name")),
        ("C:\\models\\bert", ("hf", "C:\\models\\bert")),
    ],
)
def test_schemes(spec, expected):
    assert split_spec(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tim:resnet18", "did you mean 'timm'"),
        ("embeded", "did you mean 'embedded'"),
        ("onnx:thing", "embedded, hf, timm"),
        ("hf:", "names no model"),
        ("", "named by a string"),
        ("embedded:/nowhere", "there is no"),
        ("/nowhere/at/all", "no folder '/nowhere/at/all'"),
    ],
)
def test_unknown_names_are_one_line(spec, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_backbone(spec)
    assert "\n" not in str(raised.value)


def test_options_that_a_backbone_lacks_are_refused_with_those_it_has(tmp_path):
    with pytest.raises(ValueError, match="backbone 'embedded' takes no option max_seconds; it takes none"):
        load_backbone("embedded", max_seconds=3)
    with pytest.raises(ValueError, match="takes no option max_seconds; it takes image_size, pretrained"):
        load_backbone("timm:vit_tiny_patch16_224", pretrained=False, max_seconds=3)
    save_text("bert", tmp_path / "bert")
    with pytest.raises(ValueError, match=r"backbone 'hf:.*bert' takes no option max_seconds; it takes max_length"):
        load_backbone(f"hf:{tmp_path / 'bert'}", max_seconds=3)
    assert load_backbone(f"hf:{tmp_path / 'bert'}", max_length=7).dim == 16


def test_errors_of_another_kind_are_not_taken_for_unknown_options():
    from cenote.backbones.options import built

    def broken(source, size=1):
        raise TypeError("f() got an unexpected keyword argument 'other'")

    with pytest.raises(TypeError, match="'other'"):
        built(broken, "x", "source", size=2)


def test_nearest_folder_is_suggested(tmp_path):
    (tmp_path / "minilm").mkdir()
    with pytest.raises(ValueError, match=r"did you mean '.*minilm'"):
        load_backbone(f"hf:{tmp_path}/minilmm")
    with pytest.raises(ValueError, match="not a folder written by save_pretrained"):
        load_backbone(f"hf:{tmp_path}/minilm")


def test_nearest_hub_id_is_suggested(monkeypatch):
    import transformers

    def absent(*args, **kwargs):
        raise OSError("no such repository")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", absent)
    with pytest.raises(ValueError, match="'bert-base-uncased'"):
        load_backbone("bert-base-uncasd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": True}, "bidirectional"),
        ({"device_map": "auto"}, "device_map"),
        ({"revision": "main"}, "revision"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
    ],
)
def test_options_that_do_not_apply(options, message):
    with pytest.raises(ValueError, match=message):
        load_backbone("embedded", **options)


def test_arguments_reach_from_pretrained(monkeypatch):
    import transformers

    seen = {}

    def config(name, **kwargs):
        seen["config"] = kwargs
        return object()

    def model(name, **kwargs):
        seen["model"] = kwargs
        raise ValueError("enough")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", model)
    with pytest.raises(ValueError, match="enough"):
        load_backbone("org/name", revision="abc", dtype="bfloat16", device_map="auto", trust_remote_code=True)
    assert seen["config"] == {"revision": "abc", "trust_remote_code": True}
    assert seen["model"]["device_map"] == "auto"
    assert str(seen["model"]["dtype"]) == "torch.bfloat16"
    with pytest.raises(ValueError, match="enough"):
        load_backbone("org/name")
    assert seen["config"]["trust_remote_code"] is False


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"cenote\[vision\]"):
        load_backbone("timm:resnet18")


def test_importing_the_room_imports_no_torch():
    code = "import cenote.backbones, cenote.data, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
