"""Filling the store: keys, interruptions, damage, bad features, full disks."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import resource
import signal
from pathlib import Path

import pytest
import torch

from cenote.probe import extract as extract_module
from cenote.probe.extract import extract
from cenote.probe.files import PARTIAL
from cenote.probe.loading import Seeded
from cenote.probe.store import DamagedStoreError, FeatureStore, list_stores
from probe.fakes import FakeBackbone, hidden_of, make_split, naive

COUNTS = [3, 1, 5, 2, 4, 6, 2, 2, 7, 3, 1]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def contents(folder: str | Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(folder).iterdir() if f.name != ".lock"}


def make(cache, backbone=None, split=None, **options):
    defaults = {"layers": "all", "batch_size": 2, "shard_items": 3}
    return extract(
        backbone or FakeBackbone(),
        make_split(COUNTS) if split is None else split,
        cache_dir=cache,
        **{**defaults, **options},
    )


def assert_right(store, split=None):
    split = split or make_split(COUNTS)
    hidden, mask = naive(split, range(len(split)), store.layers)
    got = store.batch(range(len(split)))
    assert torch.equal(got.hidden, hidden)
    assert torch.equal(got.mask, mask)


def interrupt_after(batches: int):
    left = batches

    def on_batch(done, total):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    return on_batch


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 5, 7])
def test_interrupted_extraction_resumes_to_the_same_bytes(tmp_path, batches):
    whole = make(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", on_batch=interrupt_after(batches))
    backbone = FakeBackbone()
    store = make(tmp_path / "cut", backbone)
    assert contents(store.path) == contents(whole.path)
    assert backbone.calls == 7 - 2 * (max(batches - 1, 0) // 2)  # shards of two batches; only whole ones survive
    assert_right(store)


def test_second_call_reads_the_cache(tmp_path):
    make(tmp_path)
    backbone, seen = FakeBackbone(), []
    assert_right(make(tmp_path, backbone, on_batch=lambda done, total: seen.append((done, total))))
    assert backbone.calls == 0
    assert seen == [(11, 11)]


def test_progress_counts_items(tmp_path):
    seen = []
    make(tmp_path, on_batch=lambda done, total: seen.append(done))
    assert seen == [0, 2, 3, 5, 6, 8, 9, 11]


def test_shards_close_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(extract_module, "SHARD_BYTES", 200)
    store = make(
        tmp_path, shard_items=None
    )  # 48 bytes a token and layers: the batches hold 4, 7, 10, 4, 10 and 1 tokens
    assert [shard.items for shard in store.manifest.shards] == [4, 2, 4, 1]
    assert_right(store)


def truncate(file: Path):
    os.truncate(file, file.stat().st_size - 1)


def flip_bit(file: Path):
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
@pytest.mark.parametrize("number", [0, 2, 3])
def test_bad_shard_is_found_and_extracted_again(tmp_path, damage, number):
    store = make(tmp_path)
    before = contents(store.path)
    damage(Path(store.path) / f"shard-0000{number}.safetensors")
    with pytest.raises(DamagedStoreError, match=f"shard-0000{number}"):
        FeatureStore.open(store.path).verify() if damage is flip_bit else FeatureStore.open(store.path)
    backbone = FakeBackbone()
    repaired = make(tmp_path, backbone)
    assert backbone.calls == (1 if number == 3 else 2)
    assert contents(repaired.path) == before
    assert_right(repaired)


def test_bad_shard_of_an_interrupted_extraction_is_repaired_on_resuming(tmp_path):
    whole = make(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", on_batch=interrupt_after(6))
    (folder,) = (tmp_path / "cut" / "features").iterdir()
    flip_bit(folder / "shard-00000.safetensors")
    assert contents(make(tmp_path / "cut").path) == contents(whole.path)


def test_leftover_of_a_killed_writer_is_removed(tmp_path):
    folder = Path(make(tmp_path).path)
    (folder / f"{PARTIAL}shard-00001.safetensors.ab12").write_bytes(b"half")
    make(tmp_path)
    assert not list(folder.glob(f"{PARTIAL}*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_item_with_features_that_are_not_finite_is_named(tmp_path, value):
    word = "NaN" if value != value else "infinite"
    with pytest.raises(ValueError, match=rf"'item-4' has {word} features \(layer 2\)"):
        make(tmp_path, FakeBackbone(poison=(4, 2, value)))


def test_overflow_of_float16_is_named(tmp_path):
    backbone = FakeBackbone(poison=(4, 2, 1e5))
    with pytest.raises(ValueError, match=r"'item-4' has values up to 1e\+05, too large for torch.float16"):
        make(tmp_path, backbone, dtype=torch.float16)
    make(tmp_path, backbone, dtype=torch.bfloat16)


def test_item_without_tokens_is_named(tmp_path):
    with pytest.raises(ValueError, match="'item-1' has no real token"):
        make(tmp_path, split=make_split([2, 0, 1]))


@pytest.mark.parametrize("modality", ["text", "image"])
def test_padding_on_the_left_is_removed(tmp_path, modality):
    right, left = (make(tmp_path / side, FakeBackbone(modality, side=side)) for side in ("right", "left"))
    assert contents(left.path) == contents(right.path)
    assert_right(left)


def test_full_disk_leaves_whole_shards_and_no_partial_file(tmp_path, monkeypatch):
    real, calls = os.fsync, 0

    def fsync(handle):
        nonlocal calls
        calls += 1
        if calls == 5:  # shard, folder, manifest, folder, and now the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"could not write .*shard-00001.safetensors: No space left") as caught:
            make(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    (folder,) = (tmp_path / "features").iterdir()
    assert contents(folder).keys() == {"manifest.json", "shard-00000.safetensors"}
    assert_right(make(tmp_path))


def test_file_that_outgrows_the_limit_is_removed(tmp_path):
    """The same by the system's own doing: writes beyond the limit on file size fail half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="could not write"):
            make(tmp_path, split=make_split([3000]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (folder,) = (tmp_path / "features").iterdir()
    assert not contents(folder)


def first_letter(item, seed):
    return item


def test_everything_in_the_key_makes_another_store(tmp_path):
    variants = [
        make(tmp_path),
        make(tmp_path, layers="last"),
        make(tmp_path, dtype=torch.bfloat16),
        make(tmp_path, view=1),
        make(tmp_path, view=1, augment=first_letter),
        make(tmp_path, view=1, augment=lambda item, seed: item),
        make(tmp_path, reduce=lambda hidden, mask: hidden[:, :1]),
        make(tmp_path, FakeBackbone(weights="b1")),
        make(tmp_path, FakeBackbone("image")),
        make(tmp_path, split=make_split(COUNTS, "d1")),
    ]
    assert len({store.path for store in variants}) == len(variants) == len(list_stores(tmp_path))
    assert make(tmp_path, layers=[3, 2, -2, 1]).path == variants[0].path


def test_augmented_view_is_seeded_by_view_and_item(tmp_path):
    def longer(item: str, seed: int) -> str:
        return f"{item.split()[0]} {1 + seed % 50}"

    one, two, again = (make(tmp_path / str(n), view=view, augment=longer) for n, view in enumerate([1, 2, 1]))
    assert torch.equal(one.counts, again.counts)
    assert not torch.equal(one.counts, two.counts)
    assert len(set(one.counts.tolist())) > 5
    threaded = make(tmp_path / "threads", view=1, augment=longer, num_workers=3)
    assert contents(threaded.path) == contents(one.path)


def test_transform_with_global_randomness(tmp_path):
    def longer(item: str) -> str:
        return f"{item.split()[0]} {random.randint(1, 9) + int(torch.randint(9, ()))}"

    before = random.getstate(), torch.get_rng_state()
    assert Seeded(longer)("3 1", 11) == Seeded(longer)("3 1", 11)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    one = make(tmp_path / "a", view=1, augment=Seeded(longer))
    two = make(tmp_path / "b", view=1, augment=Seeded(longer), num_workers=2)
    assert contents(one.path) == contents(two.path)
    assert len(set(one.counts.tolist())) > 3


class Unnamed:
    def __call__(self, item, seed):
        return item


def test_augmentation_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cache_id"):
        make(tmp_path, view=1, augment=Unnamed())
    with pytest.raises(ValueError, match="cache_id"):
        make(tmp_path, reduce=torch.nn.Linear(2, 2))


def test_reduction_is_stored(tmp_path):
    def mean(hidden, mask):
        return ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))[:, None]

    store = make(tmp_path, FakeBackbone("image"), split=make_split([7] * 5), reduce=mean)
    assert (store.uniform, store.longest, store.grid, store.prefix) == (True, 1, None, 0)
    assert torch.allclose(store.batch([3], [2]).hidden[0, 0, 0], hidden_of("3 7", 2).mean(0))


def test_threads_give_the_same_bytes_and_stop_on_errors(tmp_path):
    assert contents(make(tmp_path / "a", num_workers=3).path) == contents(make(tmp_path / "b").path)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "c", num_workers=3, on_batch=interrupt_after(3))
    assert contents(make(tmp_path / "c", num_workers=3).path) == contents(make(tmp_path / "b").path)


def test_manifest_of_another_configuration(tmp_path):
    store = make(tmp_path)
    with pytest.raises(ValueError, match="belongs to another configuration"):
        make(tmp_path, split=make_split(COUNTS[:-1]))  # same fingerprint, other length
    other = make(tmp_path, layers="last")
    manifest = Path(other.path, "manifest.json")
    manifest.write_bytes(Path(store.path, "manifest.json").read_bytes())
    with pytest.raises(ValueError, match="belongs to another configuration"):
        make(tmp_path, layers="last")
    manifest.write_text(manifest.read_text().replace('"fake:text"', '"fake:test"'))
    with pytest.raises(ValueError, match="does not fit its key"):
        make(tmp_path, layers="last")
    manifest.write_text("{")
    with pytest.raises(ValueError, match="is not a JSON file"):
        make(tmp_path, layers="last")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "dtype must be float32"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"shard_items": 0}, "shard_items must be at least 1"),
        ({"layers": "9"}, "layer numbers must lie in"),
        ({"split": make_split([])}, "no items"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def _killed_in_child(cache):
    real = os.replace

    def replace(source, target):
        if target.endswith("shard-00001.safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace
    make(cache)


def test_killed_process_leaves_a_store_that_resumes_to_the_same_bytes(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=_killed_in_child, args=(tmp_path / "cut",))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (folder,) = (tmp_path / "cut" / "features").iterdir()
    assert len(list(folder.glob(f"{PARTIAL}shard-00001*"))) == 1
    assert contents(make(tmp_path / "cut").path) == contents(make(tmp_path / "whole").path)


def _extract_in_child(cache, calls):
    backbone = FakeBackbone()
    make(cache, backbone, num_workers=0)
    calls.put(backbone.calls)


def test_second_process_waits_and_reads_what_the_first_has_written(tmp_path):
    spawn = multiprocessing.get_context("fork")
    calls = spawn.Queue()
    processes = [spawn.Process(target=_extract_in_child, args=(tmp_path, calls)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(calls.get(timeout=5) for _ in processes) == [0, 0, 7]
