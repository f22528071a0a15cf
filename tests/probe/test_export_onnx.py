"""Backbone and readout in one ONNX file that onnxruntime runs to the same scores."""

import builtins
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from backbones.hosts import save_text, save_vision
from cenote.backbones import load_backbone
from cenote.probe.artefact import ENCODER_POOLER
from cenote.probe.export_onnx import example_items, export_onnx, traceable
from probe.models import PatchBackbone, make_readout


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def pictures(count, side=20):
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def run(runtime, path, batch):
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["scores"], {name: tensor.numpy() for name, tensor in batch.items()})[0]


def check(runtime, backbone, readout, path, items):
    """Export, then compare with the readout on its own for batches of other sizes than were traced."""
    export = export_onnx(readout, backbone, path)
    assert export.max_abs_difference < 1e-4
    for some in (items, items[:1]):
        batch = backbone.collate(some)
        expected = readout(backbone(batch, readout.config.layers))
        np.testing.assert_allclose(run(runtime, path, batch), expected.numpy(), atol=1e-4)
    return export


@pytest.mark.compiled
def test_embedded_backbone(runtime, tmp_path):
    backbone = load_backbone("embedded")
    readout = make_readout(backbone, "weighted_layers > efficient_probing(num_queries=4)", layers=(1, 2, 3, 4))
    export = check(runtime, backbone, readout, tmp_path / "readout.onnx", pictures(7))
    assert export.inputs == ("pixel_values",)
    assert os.listdir(tmp_path) == ["readout.onnx"]
    import onnx

    properties = {p.key: json.loads(p.value) for p in onnx.load(str(export.path)).metadata_props if p.key == "cenote"}
    assert properties["cenote"]["classes"] == ["cat", "dog", "cow"]


@pytest.mark.compiled
def test_vit_of_transformers(runtime, tmp_path):
    save_vision("vit", tmp_path / "vit")
    backbone = load_backbone(f"hf:{tmp_path / 'vit'}")
    check(runtime, backbone, make_readout(backbone, ENCODER_POOLER), tmp_path / "readout.onnx", pictures(5))


@pytest.mark.compiled
def test_bert_of_transformers_at_any_length(runtime, tmp_path):
    save_text("bert", tmp_path / "bert")
    backbone = load_backbone(f"hf:{tmp_path / 'bert'}")
    readout = make_readout(backbone, "efficient_probing(num_queries=4)", layers=(2,), tokens="both")
    texts = ["the cat", "the dog sat on the mat", "a", "a cat ran on a mat a dog sat"]
    export = check(runtime, backbone, readout, tmp_path / "readout.onnx", texts)
    assert {"input_ids", "attention_mask"} <= set(export.inputs)


@pytest.mark.compiled
def test_a_graph_that_differs_is_not_written(runtime, tmp_path):
    backbone = PatchBackbone()
    readout = make_readout(backbone)
    with pytest.raises(ValueError, match=r"differs from torch by .* above the tolerance 0: not written"):
        export_onnx(readout, backbone, tmp_path / "readout.onnx", tolerance=0.0)
    assert os.listdir(tmp_path) == []


@pytest.mark.compiled
def test_a_module_that_cannot_be_traced_is_named(runtime, tmp_path):
    class Branching(PatchBackbone):
        def encode(self, batch, layers, reduce):
            if batch["tokens"].sum() > 0:  # depends on a value, which no graph can hold
                return super().encode(batch, layers, reduce)
            raise RuntimeError("empty")

    backbone = Branching()
    with pytest.raises(ValueError, match="cannot be traced"):
        export_onnx(make_readout(backbone), backbone, tmp_path / "readout.onnx")
    assert os.listdir(tmp_path) == []


def test_traceable_is_the_readout_of_the_backbone():
    backbone = PatchBackbone("text")
    readout = make_readout(backbone, "weighted_layers > efficient_probing(num_queries=2)", layers=(1, 2))
    batch = backbone.collate(["two words", "and three here"])
    model = traceable(backbone, readout)
    assert model.names == ("tokens", "mask")
    torch.testing.assert_close(model(*batch.values()), readout(backbone(batch, (1, 2))))
    swapped = traceable(backbone, readout, ("mask", "tokens"))
    torch.testing.assert_close(swapped(batch["mask"], batch["tokens"]), model(*batch.values()))
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"network", "readout"}


def test_refusals_before_any_work(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    backbone = PatchBackbone()
    readout = make_readout(backbone)
    with pytest.raises(ValueError, match="other weights"):
        export_onnx(readout, PatchBackbone(weights=2), tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="at least 3 items"):
        export_onnx(readout, backbone, tmp_path / "x.onnx", example_items(backbone, 2))
    assert os.listdir(tmp_path) == []


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kw):
        if name == "onnxruntime":
            raise ImportError(name, name=name)
        return real(name, *args, **kw)

    backbone = PatchBackbone()
    readout = make_readout(backbone)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"ONNX export needs onnx.*: pip install 'cenote\[onnx\]'"):
        export_onnx(readout, backbone, tmp_path / "x.onnx")
