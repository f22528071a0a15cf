"""The arithmetic of docs/scale.md against real stores and networks, and the page against the arithmetic."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cenote.backbones import load_backbone
from cenote.probe.extract import SHARD_BYTES, extract
from cenote.probe.scale import amount, duration, footprint, stored_bytes, vit_macs
from probe.fakes import FakeBackbone, make_split

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text()
spec = importlib.util.spec_from_file_location("measure_scale", ROOT / "tools" / "measure_scale.py")
measure_scale = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure_scale)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bytes_are_those_of_a_store(tmp_path, dtype):
    counts = [3, 1, 5, 2]
    store = extract(
        FakeBackbone(pooled=True), make_split(counts), layers="all", cache_dir=tmp_path, dtype=getattr(torch, dtype)
    )
    (shard,) = store.manifest.shards
    with open(f"{store.path}/{shard.file}", "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    expected = sum(stored_bytes(count, dim=4, layers=3, dtype=dtype, pooled_dim=2) for count in counts)
    assert shard.bytes - header == expected + 8  # offsets: one more than items
    with pytest.raises(ValueError, match="float32, float16, bfloat16, got 'int8'"):
        stored_bytes(1, 1, dtype="int8")


def test_macs_are_those_that_torch_counts():
    backbone = load_backbone("embedded")
    pixels = backbone.collate([Image.new("L", (8, 8))])["pixel_values"]
    # The counter does not know the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.module(pixels)
    assert vit_macs(8, 2, 64, 4, channels=1) == counter.get_total_flops() // 2
    assert vit_macs(224, 16, 384, 12) == pytest.approx(4.6e9, rel=0.01)  # the figures usually quoted
    assert vit_macs(224, 16, 768, 12) == pytest.approx(17.6e9, rel=0.01)


def test_footprint_by_hand():
    cost = footprint(
        10**6, tokens=100, dim=64, layers=2, dtype="float16", views=3, backbone_rate=500, readout_rate=2000,
        bandwidth=1e9, machines=4, epochs=10,
    )  # fmt: skip
    assert cost.item_bytes == 25_608
    assert cost.bytes == 3 * 25_608 * 10**6
    assert cost.shards == 3 * math.ceil(25_608e6 / SHARD_BYTES)
    assert cost.backbone_seconds == 3e6 / 500 / 4
    assert cost.write_seconds == pytest.approx(76.824 / 4)
    assert cost.read_seconds == pytest.approx(25.608)
    assert cost.extract_seconds == cost.backbone_seconds
    assert cost.epoch_seconds == 500
    assert cost.train_seconds == 5000
    with pytest.raises(ValueError, match="bandwidth must be positive, got 0"):
        footprint(1, 1, 1, backbone_rate=1, bandwidth=0)


def test_amounts_and_durations_are_readable():
    assert [amount(n) for n in (264, 1544, 999_600, 1_572_872, 181e12)] == [
        "264 B",
        "1.5 kB",
        "1.0 MB",
        "1.6 MB",
        "181 TB",
    ]
    assert [duration(s) for s in (0.02, 1.23, 61, 5400, 86_400 * 3.2)] == [
        "0.02 s",
        "1.2 s",
        "61 s",
        "90 min",
        "3.2 days",
    ]


def test_the_page_shows_what_the_arithmetic_gives():
    measured = json.loads((ROOT / "docs" / "scale.json").read_text())
    assert measure_scale.fill(PAGE, measured) == PAGE


def test_statements_of_the_page():
    vectors = footprint(10**9, 1, 768, backbone_rate=1, bandwidth=1.25e9)
    tokens = footprint(10**9, 197, 768, dtype="float16", backbone_rate=1, bandwidth=1.25e9)
    assert 0.6 < vectors.read_seconds / 3600 < 1
    assert tokens.read_seconds / 86_400 == pytest.approx(3, abs=0.25)


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=lambda code: code.split("\n")[0]
)
def test_code_of_the_page_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CENOTE_CACHE", str(tmp_path / "cache"))
    exec(compile(code, "scale.md", "exec"), {})
