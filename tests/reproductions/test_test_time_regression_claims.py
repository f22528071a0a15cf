"""The claims of test-time regression that need no training, and the figure."""

import pytest
import torch

from cenote.reproductions import available, test_time_regression
from cenote.reproductions.base import finding
from cenote.reproductions.test_time_regression_exact import exact_findings
from cenote.reproductions.test_time_regression_recall import CURVE
from cenote.reproductions.test_time_regression_scaling import counted_findings
from cenote.reproductions.test_time_regression_worlds import correlated_keys, uneven_key_errors


def test_it_is_offered():
    assert "test-time-regression" in available()
    assert test_time_regression.REPRODUCTION.slug == "test-time-regression"


def test_exact_claims_hold():
    found = exact_findings()
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}
    assert len({f.claim for f in found}) == len(found) == 19


def test_keys_are_as_correlated_as_asked():
    for rho in (0.0, 0.9):
        keys = correlated_keys(rho, 200, torch.Generator().manual_seed(0))[0]
        assert keys.norm(dim=-1).sub(1).abs().max() < 1e-12
        assert (keys[:, 1:] * keys[:, :-1]).sum(dim=-1).mean() == pytest.approx(rho, abs=0.03)


def test_correlated_keys_hurt_what_does_not_solve():
    found = test_time_regression.correlation_findings((0,))
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}
    assert len(found) == 9


def test_uneven_keys_hurt_the_raw_kernel():
    errors = uneven_key_errors(0)
    assert errors["normalised keys"] < errors["raw keys"]
    assert uneven_key_errors(0, spread=0.0)["raw keys"] == pytest.approx(errors["normalised keys"])


@pytest.mark.filterwarnings("error")
def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    note = f"{CURVE} 4 1.000, 16 0.420. 500 steps."
    found = [
        finding(
            "With keys of width 16, ridge recalls as much of 16 pairs as linear attention.", "", 0.4, bool, note=note
        ),
        finding(
            "With keys of width 16, linear attention recalls fewer of 16 pairs than of 4.", "", 0.4, bool, note=note
        ),
    ]
    found += test_time_regression.correlation_findings((0,))
    test_time_regression.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_costs_that_are_counted():
    counted = counted_findings()
    assert {f.claim: f.values for f in counted if f.verdict != "holds"} == {}
    assert len(counted) == 2
