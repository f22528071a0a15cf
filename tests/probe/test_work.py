"""Shards made elsewhere and coming in any order give the store of a run in one process."""

from pathlib import Path

import pytest

from cenote.probe import extract as extract_module
from cenote.probe.extract import extract
from cenote.probe.files import PARTIAL
from cenote.probe.manifest import Manifest
from probe.fakes import FakeBackbone, make_split

COUNTS = [3, 1, 5, 2, 4, 6, 2, 2, 7, 3, 1]


def contents(folder):
    return {f.name: f.read_bytes() for f in Path(folder).iterdir() if f.name != ".lock"}


def fill(cache, counts=COUNTS, backbone=None, **options):
    options = {"layers": "all", "batch_size": 2, "shard_items": 3, **options}
    return extract(backbone or FakeBackbone(), make_split(counts), cache_dir=cache, **options)


def backwards(work, jobs, layout):
    """The last job first, by a worker that leaves an unfinished file behind."""
    Path(work.folder, f"{PARTIAL}shard-00000.safetensors.dead").touch()
    for job in reversed(jobs):
        yield work.shard(job, layout)


def test_order_does_not_matter(tmp_path):
    seen = []
    store = fill(tmp_path / "far", elsewhere=backwards, on_batch=lambda done, total: seen.append(done))
    assert contents(store.path) == contents(fill(tmp_path / "here").path)
    assert seen == [0, 2, 5, 8, 11]
    assert fill(tmp_path / "far", elsewhere=None).manifest == store.manifest


@pytest.mark.parametrize("shard_items", [None, 3, 7, 100])
@pytest.mark.parametrize("limit", [1, 500, 1000, 10**6])
def test_shards_of_equal_items_end_where_a_local_run_ends_them(tmp_path, monkeypatch, shard_items, limit):
    monkeypatch.setattr(extract_module, "SHARD_BYTES", limit)
    here, far = (
        fill(tmp_path / name, [3] * 11, shard_items=shard_items, elsewhere=elsewhere)
        for name, elsewhere in (("here", None), ("far", backwards))
    )
    assert contents(far.path) == contents(here.path)


def test_what_was_made_in_order_is_kept_and_damage_is_repaired(tmp_path):
    def dies(work, jobs, layout):
        for number in (1, 0, 3):
            yield work.shard(jobs[number], layout)
        raise ValueError("no more workers")

    with pytest.raises(ValueError, match="no more workers"):
        fill(tmp_path / "far", elsewhere=dies)
    (folder,) = (tmp_path / "far" / "features").iterdir()
    assert [shard.first for shard in Manifest.read(str(folder)).shards] == [0, 3]
    (folder / "shard-00001.safetensors").unlink()
    asked = []

    def repair(work, jobs, layout):
        asked.extend(jobs)
        return backwards(work, jobs, layout)

    store = fill(tmp_path / "far", elsewhere=repair)
    assert [job.number for job in asked] == [1, 2, 3]
    assert contents(store.path) == contents(fill(tmp_path / "here").path)


def test_features_that_change_shape_between_machines_are_refused(tmp_path):
    def mixed(work, jobs, layout):
        yield work.shard(jobs[0])
        done = work.shard(jobs[1])
        yield done._replace(layout=type(done.layout)(done.layout.dim + 1, 0, None, None))

    with pytest.raises(ValueError, match="changed shape"):
        fill(tmp_path, elsewhere=mixed)
