"""One readout trained in several processes gives what the probe's own trainer gives in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cenote.backbones import load_backbone
from cenote.data.base import Split
from cenote.data.items import ArrayImages
from cenote.probe.extract import extract
from cenote.probe.feed import Feed
from cenote.probe.heads import Member
from cenote.probe.plan import Candidate
from cenote.probe.readout import Readout
from cenote.probe.tasks import Objective
from cenote.probe.train import Group, Schedule, train_groups

pytest.importorskip("accelerate", reason="needs the extra 'distributed'")

from cenote.tuning import accelerated
from cenote.tuning.accelerated import train_readout

CLASSES = ("dark", "middle", "bright")
EP = {"lr": 0.03, "query_factor": 10.0, "epochs": 3, "batch_size": 16, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Noisy images of three brightnesses: 49 to train on (the last of the batches of 16 has a single item), 20 held
    out."""
    cache, backbone, found = tmp_path_factory.mktemp("cache"), load_backbone("embedded"), []
    for seed, count in ((0, 49), (1, 20)):
        rng = np.random.default_rng(seed)
        label = rng.integers(0, 3, count)
        pixels = rng.normal(80 + 40 * label[:, None, None], 60, (count, 8, 8)).clip(0, 255).astype(np.uint8)
        split = Split(
            ArrayImages(pixels), torch.from_numpy(label), [str(n) for n in range(count)], f"brightness-{seed}"
        )
        found.append((extract(backbone, split, layers=(4,), cache_dir=cache), split.targets))
    return found


def fit(parts, readout="ep(num_queries=4)", **options):
    return train_readout(readout, *parts, **{"classes": CLASSES, "device": "cpu", **EP, **options})


def weights(readout: Readout) -> dict[str, torch.Tensor]:
    return {name: t for name, t in readout.state_dict().items() if "num_batches" not in name}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


# Not AbMILP: some of its biases have no gradient in exact arithmetic, and AdamW makes steps of what rounding leaves.
@pytest.mark.parametrize("name", ["ep(num_queries=4)", "gem"])
def test_one_process_gives_what_the_probe_gives(parts, name):
    trained = fit(parts, name)
    config = trained.readout.config
    member = Member(EP["lr"], EP["query_factor"] if "ep" in name else 1.0, 0)
    candidate = Candidate(name, (4,), "patches", tuple(config.options.items()), (member,))
    schedule = Schedule.sized(49, EP["epochs"], EP["batch_size"], weight_decay=EP["weight_decay"])
    objective = Objective("classification", 3)
    group = Group.create(candidate, 64, objective, schedule, True)
    train, validation = (Feed(store, targets, (4,)) for store, targets in parts)
    train_groups([group], [train], validation, schedule)
    pooling, norm, head = group.stack.member(group.best, 0)
    expected = Readout(config, pooling, norm, head)
    assert_close(weights(trained.readout), weights(expected), 1e-5)
    assert trained.validation == pytest.approx(float(group.best_score[0]))
    assert trained.epoch == group.best_epoch[0] + 1
    assert len(trained.scores) == 3


def test_two_processes_give_what_one_gives(parts, tmp_path):
    runs = {"whole": {}, "pieces": {"accumulate": 2}}
    job = {
        "args": ["ep(num_queries=4)"],
        "stores": {"train": parts[0][0].path, "validation": parts[1][0].path},
        "runs": {
            name: {"classes": CLASSES, "device": "cpu", **EP, **options, "folder": str(tmp_path / f"at-{name}")}
            for name, options in runs.items()
        },
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    save_file({"train": parts[0][1], "validation": parts[1][1]}, tmp_path / "targets.safetensors")
    script = Path(__file__).with_name("accelerated_script.py")
    # What `accelerate launch --multi_gpu` runs; between CPUs that command itself wants MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, script, tmp_path], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, options in runs.items():
        alone = fit(parts, **options)
        together = Readout.from_pretrained(tmp_path / name)
        assert_close(weights(together), weights(alone.readout), 1e-4)
        assert json.loads((tmp_path / name / "scores.json").read_text()) == pytest.approx(alone.scores)
        assert (tmp_path / f"at-{name}" / "checkpoint.safetensors").exists()


def test_accumulated_pieces_weigh_as_rows_of_one_batch(parts):
    """One step on one batch of 20 in three pieces, against the sum of their losses by hand."""
    store, targets = parts[1]
    options = {"epochs": 2, "batch_size": 20, "accumulate": 3, "query_factor": 1.0, "weight_decay": 0.0}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        step = accelerated._Run._step

        def watched(self, pieces, rows, rate):
            before = {n: p.detach().clone() for n, p in self.plain.named_parameters()}
            patch.setattr(self.stepper, "zero_grad", lambda: None)
            step(self, pieces, rows, rate)
            seen.append((self, before, {n: p.grad.clone() for n, p in self.plain.named_parameters()}, pieces, rows))
            raise InterruptedError

        patch.setattr(accelerated._Run, "_step", watched)
        with pytest.raises(InterruptedError):
            fit([(store, targets)] * 2, **options)
    (run, before, grads, pieces, rows) = seen[0]
    assert rows == 20
    assert [len(t) for _, t in pieces] == [7, 7, 6]
    own = {name: p.requires_grad_() for name, p in before.items()}
    for features, labels in pieces:
        outputs = torch.func.functional_call(run.plain, own, (features.hidden[:, 0, 1:], None))
        (F.cross_entropy(outputs, labels, reduction="sum") / 20).backward()
    assert_close(grads, {name: p.grad for name, p in own.items()}, 1e-5)


def test_interrupted_in_an_epoch_it_goes_on_to_the_same_numbers(parts, tmp_path, monkeypatch):
    whole = fit(parts)
    step, left = accelerated._Run._step, 5

    def failing(self, *args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(accelerated._Run, "_step", failing)
        with pytest.raises(KeyboardInterrupt):
            fit(parts, folder=tmp_path, save_every=2)
    resumed = fit(parts, folder=tmp_path, save_every=2)
    assert resumed.scores == whole.scores
    for name, tensor in weights(whole.readout).items():
        assert torch.equal(weights(resumed.readout)[name], tensor)
    assert not any(name.endswith((".bin", ".pkl", ".pt")) for name in os.listdir(tmp_path))
    assert "optimizer.head.weight.exp_avg" in load_file(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="another configuration"):
        fit(parts, folder=tmp_path, weight_decay=0.1)
    store, targets = parts[0]
    with pytest.raises(ValueError, match="another configuration"):
        fit([(store, targets.roll(1)), parts[1]], folder=tmp_path)


def test_what_cannot_be_trained_is_refused(parts):
    with pytest.raises(ValueError, match="no parameters"):
        fit(parts, "mean")
    with pytest.raises(ValueError, match="is 2 readouts"):
        fit(parts, "ep(num_queries=4)", layers=(4, 4, 3))
    (store, targets), validation = parts
    with pytest.raises(ValueError, match="holds 49 items, but there are 48 targets"):
        fit([(store, targets[:48]), validation])
