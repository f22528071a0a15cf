"""The exact claims of both in-context reproductions, and that their verdicts follow from what was measured."""

import numpy as np
import pytest
import torch

from cenote.reproductions import abrupt_icl, available
from cenote.reproductions import icl_linear_regression as regression
from cenote.reproductions.abrupt_icl_exact import exact_findings as abrupt_exact
from cenote.reproductions.icl_linear_regression_exact import exact_findings as regression_exact
from cenote.worlds.induction import InductionNetwork
from cenote.worlds.induction_theory import descend, fit_phenomenological
from cenote.worlds.induction_training import InductionRuns
from cenote.worlds.regression_attention import RegressionAttention


def test_both_are_offered():
    assert {"abrupt-icl", "icl-linear-regression"} <= set(available())


@pytest.mark.parametrize("findings", [abrupt_exact, regression_exact])
def test_exact_claims_hold(findings):
    found = findings()
    assert len(found) > 9
    assert {each.claim: each.values for each in found if each.verdict != "holds"} == {}
    assert len({each.claim for each in found}) == len(found)


def made_up_runs(world, ila_early: float) -> InductionRuns:
    steps = tuple(range(0, 8001, 500))
    at = torch.tensor(steps, dtype=torch.float32)[:, None]

    def jump(step: float, low: float, high: float) -> torch.Tensor:
        return torch.where(at < step, low, high)

    way = descend(4, 16, 160.0)
    loss = torch.from_numpy(np.interp(np.array(steps) / 50, way.times, way.losses)).float()[:, None]
    measures = {
        "loss": loss,
        "accuracy": jump(5000, 0.2, 0.97),
        "cla": jump(3000, 0.3, 0.9),
        "ila1": jump(5000, ila_early, 0.8),
        "tila2": jump(5000, 0.1, 0.8),
        "tla2": jump(5000, 0.5, 0.9),
        "iw": jump(0, 0.1, 0.1),
        "ic2": jump(0, 0.1, 0.1),
    }
    network = InductionNetwork.for_world(world, generator=torch.Generator().manual_seed(0))
    return InductionRuns((world,), (network,), steps, measures)


@pytest.mark.parametrize(("ila_early", "verdict"), [(0.25, "holds"), (0.4, "does not hold")])
def test_verdicts_on_the_transition(ila_early, verdict, tmp_path):
    runs = made_up_runs(abrupt_icl.WORLD, ila_early)
    fits = {
        start: [fit_phenomenological(runs.steps, runs.measures["loss"][:, 0].tolist(), 4, 16, fit_start=False)]
        for start in (False, True)
    }
    found = abrupt_icl.transition_findings(runs, fits, {"transition": runs, "L=N": runs, "K=32, B=1": runs})
    verdicts = {each.unit: each.verdict for each in found}
    assert found[0].verdict == verdict
    assert found[0].values == (2000,)
    assert verdicts["steps after"] == "holds"
    assert verdicts["nats"] == "does not hold"  # the made-up loss falls with L = N too
    assert abrupt_icl.fit_findings(fits)[0].verdict == "holds"
    known, fresh = abrupt_icl.data_findings({"K=32, B=1": runs})
    assert (known.verdict, fresh.verdict) == ("does not hold", "does not hold")
    abrupt_icl.REPRODUCTION.figure(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_accuracy_by_offset_moves_the_window_alone():
    world = abrupt_icl.WORLD
    network = InductionNetwork.for_world(world, generator=torch.Generator().manual_seed(1))
    accuracies = abrupt_icl.accuracy_by_offset(network, world, items=200)
    assert len(accuracies) == world.positions - world.tokens + 1 == 9
    with torch.no_grad():
        for head in network.attn:
            head.q[:, :17] = head.k[:, :17] = head.v[:, :17] = 0
            head.v[:17] = 0
        for layer in network.mlp:
            layer.weight[:, :17] = layer.weight[:17] = 0
        network.readout.weight[:, :17] = 0
    assert len(set(abrupt_icl.accuracy_by_offset(network, world, items=200))) == 1  # blind to positions


def test_untrained_heads_do_not_show_the_pattern(tmp_path):
    seeds = (0, 1)
    trained = {
        "four": RegressionAttention(5, 4, seeds=seeds),
        "one": RegressionAttention(5, 1, seeds=seeds),
        "linear": RegressionAttention(5, 1, attention="linear", divisor=40.0, seeds=seeds),
    }
    patterns = regression.pattern_findings(trained["four"], items=2000)
    verdicts = {each.unit: each.verdict for each in patterns}
    assert verdicts["% above the debiased step's risk"] == "does not hold"
    assert verdicts["% away from theory"] == "does not hold"
    assert verdicts["mean squared error"] == "does not hold"
    risks = regression.risk_findings(trained, items=2000)
    assert risks[0].verdict == "does not hold"
    assert trained["linear"].divisor == 40.0
    three = {"3 heads for two tasks": RegressionAttention(6, 3, 2, seeds=seeds)}
    superposed = regression.multi_task_findings(three, items=2000)
    assert superposed[0].verdict == "does not hold"
    regression.REPRODUCTION.figure([*patterns, *risks], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
