"""A probe on a Ray cluster of two nodes gives what one process gives, also when a node dies in the middle."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cenote.backbones import load_backbone
from cenote.cli import main
from cenote.data import load_data
from cenote.probe import probe
from cenote.probe.extract import extract
from cenote.probe.feed import Feed
from cenote.probe.plan import Host, plan
from cenote.probe.tasks import Objective
from cenote.probe.train import Group, Schedule, train_groups
from probe.fakes import FakeBackbone, make_split

ray = pytest.importorskip("ray", reason="needs the extra 'distributed'")
pytest.importorskip("ray.data", reason="needs the extra 'distributed'")

from ray.cluster_utils import Cluster  # noqa: E402

from cenote.integrations import ray as engine  # noqa: E402
from cenote.integrations.ray import RayEngine  # noqa: E402
from integrations.ray_helpers import Trap, TrappedItems, TrappedObjective, UselessObjective  # noqa: E402

COUNTS = [3, 1, 5, 2, 4, 6, 2, 2, 7, 3, 1, 4, 2, 5]
SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    tests = str(Path(__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")])))
        patch.setenv("CENOTE_TEST_BUCKET", str(tmp_path_factory.mktemp("bucket")))
        try:
            cluster = Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False})
        except Exception as error:  # no shared memory, no free ports, ...: nothing of ours
            pytest.skip(f"no Ray cluster can be started here: {error}")
        try:
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def victim(cluster, tmp_path):
    """A second node that is killed as soon as a task on it is in the middle of its work."""
    node = cluster.add_node(**SMALL)
    cluster.wait_for_nodes()
    trap = Trap(str(tmp_path), node.node_id, os.getpid())
    over = threading.Event()

    def kill():
        while not trap.caught.exists():
            if over.wait(0.02):
                return
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    yield trap
    over.set()
    killer.join()


def contents(folder):
    return {f.name: f.read_bytes() for f in Path(folder).iterdir() if f.name != ".lock"}


def fill(cache, split=None, backbone=None, **options):
    return extract(
        backbone or FakeBackbone(), split or make_split(COUNTS), layers="all", cache_dir=cache, batch_size=2,
        **{"shard_items": 3, **options},
    )  # fmt: skip


def test_shards_are_those_of_a_local_run_and_either_goes_on_from_the_other(cluster, tmp_path):
    engine = RayEngine()
    local = fill(tmp_path / "local")
    seen = []
    store = fill(
        tmp_path / "ray", elsewhere=engine.extraction(), on_batch=lambda done, total: seen.append((done, total))
    )
    assert contents(store.path) == contents(local.path)
    assert len(contents(store.path)) == 6  # five shards and the manifest
    assert seen[0] == (0, 14)
    assert seen[-1] == (14, 14)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    def stop(done, total):
        if done >= 6:
            raise KeyboardInterrupt

    for first, second in (({}, {"elsewhere": engine.extraction()}), ({"elsewhere": engine.extraction()}, {})):
        cache = tmp_path / f"{bool(first)}"
        with pytest.raises(KeyboardInterrupt):
            fill(cache, on_batch=stop, **first)
        resumed = fill(cache, **second)
        assert contents(resumed.path) == contents(local.path)
    backbone = FakeBackbone()
    fill(tmp_path / "ray", backbone=backbone)
    assert backbone.calls == 0

    (Path(store.path) / "shard-00002.safetensors").write_bytes(b"short")
    fill(tmp_path / "ray", elsewhere=engine.extraction())
    assert contents(store.path) == contents(local.path)


def test_a_process_loads_its_backbone_once_for_all_parts(monkeypatch):
    loaded, backbone = [], load_backbone("embedded")
    monkeypatch.setattr(engine, "_BACKBONES", {})
    monkeypatch.setattr(engine, "load_backbone", lambda *a, **k: loaded.append(a) or backbone)
    for source in (("embedded", {}), ("embedded", {}), ("embedded", {"device": "cpu"})):
        assert engine._backbone(source, backbone.fingerprint()) is backbone
    assert len(loaded) == 2


def test_workers_write_to_an_object_store(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("CENOTE_CACHE", str(tmp_path / "fetched"))
    split = make_split(COUNTS)
    sent = type(split)(TrappedItems(split.items), split.targets, split.ids, split.fingerprint)
    store = fill("bucket://somewhere", sent, elsewhere=RayEngine().extraction())
    assert store.path.startswith("bucket://somewhere/features/")
    folder = Path(os.environ["CENOTE_TEST_BUCKET"]) / store.path.removeprefix("bucket://")
    assert contents(folder) == contents(fill(tmp_path / "local").path)
    assert len(store.batch(range(14)).hidden) == 14


def test_a_bad_item_is_named(cluster, tmp_path):
    backbone = FakeBackbone(poison=(7, 2, float("nan")))
    with pytest.raises(ValueError, match=r"^item 'item-7' has NaN features \(layer 2\)$"):
        fill(tmp_path, backbone=backbone, elsewhere=RayEngine().extraction())


def test_node_killed_in_the_middle_of_extraction(cluster, victim, tmp_path):
    split = make_split(COUNTS)
    trapped = type(split)(TrappedItems(split.items, victim), split.targets, split.ids, split.fingerprint)
    store = fill(tmp_path / "ray", trapped, elsewhere=RayEngine().extraction())
    assert victim.caught.exists()
    assert contents(store.path) == contents(fill(tmp_path / "local").path)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Three readouts on the digits: feeds, schedule, and fresh groups for an objective."""
    data = load_data("digits", limit=120)
    cache = tmp_path_factory.mktemp("cache")
    feeds = [
        Feed(extract(load_backbone("embedded"), split, layers=(3, 4), cache_dir=cache), split.targets, (3, 4))
        for split in (data.train, data.validation)
    ]
    store = feeds[0].store
    host = Host(store.dim, store.layers, store.grid, store.prefix, "image", True)
    candidates = plan("ep(num_queries=4),gem,concat_layers > mean,cbam", host, 4, (4,), "auto", 2, None, None)
    schedule = Schedule(5, 1.0, 32)

    def fresh(objective):
        return [Group.create(c, host.dim, objective, schedule, True) for c in candidates if c.members]

    return feeds, schedule, fresh


def assert_same_states(groups, expected):
    for group, other in zip(groups, expected, strict=True):
        assert group.finished
        assert group.stack.members == other.stack.members
        np.testing.assert_array_equal(group.best_score, other.best_score)
        np.testing.assert_array_equal(group.best_loss, other.best_loss)
        assert group.best.keys() == other.best.keys()
        assert all(torch.equal(group.best[name], other.best[name]) for name in group.best)


def test_node_killed_in_the_middle_of_the_sweep(cluster, victim, sweep, tmp_path):
    (train, validation), schedule, fresh = sweep
    expected = fresh(Objective("classification", 10))
    assert train_groups(expected, [train], validation, schedule)

    groups, seen = fresh(TrappedObjective("classification", 10, trap=victim)), []
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    assert RayEngine().train(groups, [train], validation, folder, float("inf"), seen.append)
    assert victim.caught.exists()
    assert len(seen) == len(groups) == 3
    assert_same_states(groups, expected)

    again = fresh(UselessObjective("classification", 10))
    assert RayEngine().train(again, [train], validation, folder, float("inf"), seen.append)
    assert_same_states(again, expected)


def test_deadline_ends_training_and_errors_arrive_as_they_were_raised(cluster, sweep):
    (train, validation), _, fresh = sweep
    groups = fresh(Objective("classification", 10))[:1]
    assert not RayEngine().train(groups, [train], validation, None, time.monotonic() - 1, lambda group: None)
    assert groups[0].epoch == 0
    assert np.isfinite(groups[0].best_score).all()
    with pytest.raises(ValueError, match=r"^there is nothing left to train$"):
        RayEngine().train(
            fresh(UselessObjective("classification", 10))[:1], [train], validation, None, float("inf"), print
        )


def test_command_line_gives_the_local_table(cluster, tmp_path, capsys):
    settings = {"readouts": "mean,gem,ep(num_queries=4),knn", "seeds": 1, "epochs": 3}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    folders = ["--out", str(tmp_path / "ray"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["probe", "--engine", "ray", "--limit", "160", *options, *folders]) == 0, capsys.readouterr().err
    local = probe(**settings, cache_dir=str(tmp_path / "local"), data_options={"limit": 160})
    rows = json.loads((tmp_path / "ray" / "results.json").read_text())
    timed = {"latency_ms", "train_seconds", "schema", "extra"}
    for row, expected in zip(rows, local.rows, strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {k: getattr(expected, k) for k in row.keys() - timed}
    arrays = np.load(tmp_path / "ray" / "predictions.npz")
    for name, predictions in local.predictions.items():
        np.testing.assert_array_equal(arrays[name], predictions)


def test_what_cannot_be_is_said(monkeypatch, capsys):
    with pytest.raises(ValueError, match="engine must be 'local' or 'ray', got 'spark'"):
        probe(engine="spark")
    assert main(["probe", "--ray-address", "auto"]) == 2
    assert "of use to engine 'ray' only" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "cenote.integrations.ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["probe", "--engine", "ray"]) != 0
    assert "pip install 'cenote[distributed]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: ray.exceptions.WorkerCrashedError(), r"WorkerCrashedError: .*call again with resume"),
        (
            lambda: ray.exceptions.OutOfMemoryError("Task was killed\nbecause"),
            r"Task was killed\): give each task more",
        ),
        (lambda: ray.exceptions.NodeDiedError("node 7 died"), "node 7 died.*nodes live"),
        (lambda: ray.exceptions.RaySystemError("broken"), "RaySystemError"),
    ],
)
def test_what_ray_itself_could_not_do_is_one_line(error, message, monkeypatch):
    def fail(task):
        raise error()

    monkeypatch.setattr(engine.ray, "get", fail)
    with pytest.raises(OSError, match=message) as caught:
        engine._result(None)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_a_task_raised_comes_out_as_it_was(monkeypatch):
    def fail(cause):
        raise ray.exceptions.RayTaskError("task", "traceback", cause)

    monkeypatch.setattr(engine.ray, "get", fail)
    with pytest.raises(ValueError, match=r"^mine$"):
        engine._result(ValueError("mine"))
    with pytest.raises(OSError, match=r"lost a task \(WorkerCrashedError"):
        engine._result(ray.exceptions.WorkerCrashedError())
