"""Reading the store: gathering, types, remote folders, damage, the cache directory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from cenote.probe.extract import extract
from cenote.probe.files import read_json, write_atomically, write_json
from cenote.probe.store import DamagedStoreError, FeatureStore, clear, list_stores
from probe.fakes import DIM, FakeBackbone, make_split, naive

COUNTS = [3, 1, 5, 2, 4, 6, 2, 2, 7, 3, 1]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def make(cache, counts=COUNTS, backbone=None, **options):
    defaults = {"layers": "all", "batch_size": 2, "shard_items": 3}
    return extract(backbone or FakeBackbone(), make_split(counts), cache_dir=cache, **{**defaults, **options})


def test_round_trip_of_images(tmp_path):
    store = FeatureStore.open(make(tmp_path, [7] * 8, FakeBackbone("image", pooled=True)).path)
    assert (len(store), store.layers, store.dim, store.grid, store.prefix) == (8, (1, 2, 3), DIM, (2, 3), 1)
    assert (store.pooled_dim, store.uniform) == (2, True)
    assert store.counts.tolist() == [7] * 8
    features = store.batch([5, 0, 5])
    hidden, mask = naive(make_split([7] * 8), [5, 0, 5], (1, 2, 3))
    assert torch.equal(features.hidden, hidden)
    assert torch.equal(features.mask, mask)
    assert (features.layers, features.grid, features.prefix) == ((1, 2, 3), (2, 3), 1)
    assert features.pooled.tolist() == [[5, -1], [0, -1], [5, -1]]
    assert store.pooled(torch.tensor([6, 1])).tolist() == [[6, -1], [1, -1]]


def test_round_trip_of_text(tmp_path):
    store = FeatureStore.open(make(tmp_path).path)
    assert (len(store), store.grid, store.prefix, store.pooled_dim, store.uniform) == (11, None, 0, None, False)
    assert store.counts.tolist() == COUNTS
    with pytest.raises(ValueError, match="no pooled output"):
        store.pooled([0])


def test_shards_are_safetensors_without_padding(tmp_path):
    store = make(tmp_path, backbone=FakeBackbone(side="left", pooled=True))
    tensors = load_file(Path(store.path) / "shard-00001.safetensors")  # the library's own reader
    assert tensors.keys() == {"offsets", "layer.1", "layer.2", "layer.3", "pooled"}
    assert tensors["offsets"].tolist() == [0, 2, 6, 12]
    assert tensors["layer.2"].shape == (12, DIM)
    assert tensors["pooled"].shape == (3, 2)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gathering_equals_the_naive_way(tmp_path_factory, data):
    longest = data.draw(st.sampled_from([1, 2, 6]))
    counts = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=12))
    indices = data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=20))
    layers = data.draw(st.lists(st.sampled_from([0, 1, 3]), min_size=1, max_size=3))
    store = make(
        tmp_path_factory.mktemp("store"),
        counts,
        FakeBackbone(side=data.draw(st.sampled_from(["left", "right"]))),
        layers=[0, 1, 3],
        batch_size=data.draw(st.integers(1, 5)),
        shard_items=data.draw(st.one_of(st.none(), st.integers(1, 5))),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16])),  # exact below 2048 * 2
    )
    hidden, mask = naive(make_split(counts), indices, layers)
    got = store.batch(np.array(indices), layers)
    assert torch.equal(got.mask, mask)
    torch.testing.assert_close(got.hidden, hidden, rtol=1e-3, atol=0)
    assert store.counts.tolist() == counts
    assert store.uniform == (len(set(counts)) == 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_type(tmp_path, dtype):
    half = make(tmp_path, dtype=dtype)
    expected = make(tmp_path).batch([8, 2]).hidden.to(dtype)
    assert torch.equal(half.batch([8, 2]).hidden, expected.float())
    raw = FeatureStore.open(half.path, dtype=None).batch([8, 2]).hidden
    assert raw.dtype == dtype
    assert torch.equal(raw, expected)


def test_layers_subset_in_the_order_asked_for(tmp_path):
    store = make(tmp_path)
    everything = store.batch([1, 4])
    some = store.batch([1, 4], [3, 1])
    assert some.layers == (3, 1)
    assert torch.equal(some.hidden, everything.hidden[:, [2, 0]])
    assert store.batch([1], 2).layers == (2,)


def test_batch_into_a_buffer(tmp_path):
    for counts in ([4] * 11, COUNTS):
        store = make(tmp_path, counts, layers="last", backbone=FakeBackbone(weights=str(counts)))
        buffer = torch.full((1000,), -7.0)
        got = store.batch([10, 3], out=buffer)
        assert got.hidden.data_ptr() == buffer.data_ptr()
        assert torch.equal(got.hidden, store.batch([10, 3]).hidden)
        assert (buffer[got.hidden.numel() :] == -7).all()
    for unfit in (torch.empty(3), torch.empty(1000, dtype=torch.float64), torch.empty(1000, 2)[:, 0]):
        with pytest.raises(ValueError, match="out must be a contiguous"):
            store.batch([0, 1], out=unfit)


def test_batches_have_a_fixed_order(tmp_path):
    store = make(tmp_path)
    assert [indices.tolist() for indices, _ in store.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    runs = [torch.cat([indices for indices, _ in store.batches(4, shuffle_seed=seed)]).tolist() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert sorted(runs[0]) == list(range(11))
    for indices, features in store.batches(4, shuffle_seed=1, layers=[2]):
        assert torch.equal(features.hidden, store.batch(indices, [2]).hidden)


@pytest.mark.parametrize(
    ("indices", "layers", "message"),
    [
        ([11], None, r"0\.\.10, got 11\.\.11"),
        ([-1], None, r"0\.\.10"),
        ([], None, "one dimension"),
        ([0.5], None, "float64"),
        ([[1]], None, "one dimension"),
        ([1], [0], r"stored, \[1, 2, 3\], got \[0\]"),
        ([1], [], "layers must be among"),
    ],
)
def test_bad_requests(tmp_path, indices, layers, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path).batch(indices, layers)


def test_flipped_bit_is_found_before_anything_is_read(tmp_path):
    store = make(tmp_path)
    file = Path(store.path) / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)
    opened = FeatureStore.open(store.path)
    opened.batch([0, 1, 2])  # the other shards are sound
    with pytest.raises(DamagedStoreError, match="shard-00001"):
        opened.batch([0, 4])
    with pytest.raises(DamagedStoreError, match="shard-00001"):
        opened.verify()


def test_shard_that_changes_during_a_session_is_checked_again(tmp_path):
    store = make(tmp_path)
    store.batch([4])
    store.release()
    store.batch([4])
    store.release()
    file = Path(store.path) / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    time.sleep(0.02)
    file.write_bytes(data)
    with pytest.raises(DamagedStoreError, match="shard-00001"):
        store.batch([4])


def test_file_of_another_size_is_found_at_opening(tmp_path):
    store = make(tmp_path)
    os.truncate(Path(store.path) / "shard-00002.safetensors", 100)
    with pytest.raises(DamagedStoreError, match="shard-00002"):
        FeatureStore.open(store.path)


def test_opening_an_unfinished_store(tmp_path):
    def stop(done, total):
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, on_batch=stop)
    (info,) = list_stores(tmp_path)
    with pytest.raises(ValueError, match="holds 3 of 11 items"):
        FeatureStore.open(info.path)
    assert (info.complete, info.summary()["stored"]) == (False, 3)


def test_mapped_shards_keep_no_file_open_and_stay_out_of_anonymous_memory(tmp_path):
    store = make(tmp_path, [5] * 60, layers="last", shard_items=2)
    handles = len(os.listdir("/proc/self/fd"))
    for number in range(0, 60, 2):
        store.batch([number])
    assert len(os.listdir("/proc/self/fd")) == handles
    assert len(store.shards._mapped) == 30
    store.release()
    assert not store.shards._mapped


def test_remote_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CENOTE_CACHE", str(tmp_path / "local"))
    fs = fsspec.filesystem("memory")
    store = make("memory://probe-store-test")
    try:
        assert store.path.startswith("memory://probe-store-test/features/")
        assert not [name for name in fs.find("/probe-store-test") if ".partial" in name]
        hidden, _ = naive(make_split(COUNTS), [9, 0, 5], store.layers)
        assert torch.equal(store.batch([9, 0, 5]).hidden, hidden)
        copies = list((tmp_path / "local" / "fetched").iterdir())
        assert len(copies) == 3  # the shards that were needed

        copies[0].write_bytes(b"rotten")  # a bad local copy is fetched again
        assert torch.equal(FeatureStore.open(store.path).batch([9, 0, 5]).hidden, hidden)

        remote = store.path.removeprefix("memory:/") + "/shard-00001.safetensors"
        data = bytearray(fs.cat(remote))
        data[-1] ^= 1
        fs.pipe(remote, bytes(data))
        for copy in (tmp_path / "local" / "fetched").iterdir():
            copy.unlink()
        with pytest.raises(DamagedStoreError, match="shard-00001"):
            FeatureStore.open(store.path).batch([4])
        backbone = FakeBackbone()
        repaired = make("memory://probe-store-test", backbone=backbone)
        assert backbone.calls == 2
        assert torch.equal(repaired.batch([9, 0, 5]).hidden, hidden)
        assert len(clear("memory://probe-store-test")) == 1
        assert not list((tmp_path / "local" / "fetched").iterdir())
        assert list_stores("memory://probe-store-test") == []
    finally:
        if fs.exists("/probe-store-test"):
            fs.rm("/probe-store-test", recursive=True)


def test_file_url_is_a_plain_path(tmp_path):
    plain, url = make(tmp_path), make(f"file://{tmp_path}")
    assert url.path == plain.path
    assert FeatureStore.open(f"file://{plain.path}").path == plain.path


def test_cache_directory_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CENOTE_CACHE", str(tmp_path))
    assert make(None).path.startswith(str(tmp_path))
    assert len(list_stores()) == 1


def test_list_and_clear(tmp_path):
    text, image = make(tmp_path), make(tmp_path, [7] * 3, FakeBackbone("image"))
    (tmp_path / "features" / "notes").mkdir()  # not a store: left alone
    assert {info.path for info in list_stores(tmp_path)} == {text.path, image.path}
    (info,) = (info for info in list_stores(tmp_path) if info.path == text.path)
    assert info.bytes == sum(f.stat().st_size for f in Path(text.path).iterdir())
    assert clear(tmp_path, incomplete=True) == []
    Path(text.path, "manifest.json").unlink()
    assert [info.path for info in clear(tmp_path, incomplete=True)] == [text.path]
    assert clear(tmp_path, "nothing-like-it") == []
    assert [info.path for info in clear(tmp_path, "fake:im")] == [image.path]
    assert [p.name for p in (tmp_path / "features").iterdir()] == ["notes"]
    assert list_stores(tmp_path / "absent") == []


def test_command_line(tmp_path):
    from cenote.cli.cache import app

    def run(*args, **options):
        return CliRunner().invoke(app, [*args, "--cache-dir", str(tmp_path)], catch_exceptions=False, **options)

    assert run("where").output.strip() == f"{tmp_path}/features"
    assert "no stored features" in run("list").output
    store = make(tmp_path)
    assert "fake:text" in run("list").output
    assert '"items": 11' in run("list", "--json").output
    assert run("clear", input="n\n").exit_code == 1
    assert Path(store.path).exists()
    assert "removed 1 stores" in run("clear", "--yes").output
    assert "nothing to remove" in run("clear", "--yes").output
    assert not Path(store.path).exists()


def test_atomic_writing(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": [1, 2]})
    assert read_json(path) == {"a": [1, 2]}

    def fail(file):
        file.write(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_atomically(path, fail)
    assert read_json(path) == {"a": [1, 2]}
    assert [f.name for f in path.parent.iterdir()] == ["file.json"]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))
    with pytest.raises(OSError, match="could not write"):
        write_atomically(path / "below-a-file", b"")
