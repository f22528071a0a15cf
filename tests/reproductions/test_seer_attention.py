"""SeerAttention's reproduction: its toy can be learnt, its findings say what the numbers say, its figure is drawn."""

from statistics import fmean

import pytest
import torch

from cenote.reproductions.seer_attention import curve_findings, fact_findings
from cenote.reproductions.seer_attention_exact import exact_findings
from cenote.reproductions.seer_attention_figure import draw_seer
from cenote.reproductions.seer_attention_planted import BLOCK, planted_losses, planted_tokens
from cenote.reproductions.seer_attention_worlds import LEARNED, RULES


def run(scale):
    return {
        name: {1.0: 5.0, 0.5: 5.0 + 0.01 * rank, 0.3: 5.0 + 0.02 * rank, 0.2: 5.0 + 0.05 * rank, 0.1: 5.0 + scale}
        for rank, name in enumerate((LEARNED, *RULES.values()), start=1)
    }


def test_planted_keys_can_be_learnt():
    losses = planted_losses(0, 100)
    assert fmean(losses[-15:]) < 0.85 * fmean(losses[:5])


def test_planted_directions_stand_in_earlier_blocks():
    torch.manual_seed(0)
    query, key = planted_tokens()
    means = query.unflatten(2, (-1, BLOCK)).mean(3)[0, 0, 1:]
    best = (means @ key[0, 0].T).argmax(-1) // BLOCK
    assert (best <= torch.arange(len(means))).float().mean() > 0.9


def test_findings_say_what_the_numbers_say(tmp_path):
    pytest.importorskip("matplotlib")
    good = curve_findings([run(1.0), run(2.0)], "a model", "some steps")
    assert all(each.verdict == "holds" for each in good)
    assert good[0].claim == "In a model at density 0.2 the learned gate loses less perplexity than Quest bounds."
    assert good[0].values[0] == pytest.approx(100 * (5.1 / 5.05 - 1))
    learned = next(each for each in good if each.claim.startswith("Perplexity grows") and LEARNED in each.claim)
    assert learned.values == pytest.approx((0.2, 0.4, 1.0, 30.0))
    falling = curve_findings([run(0.0)], "a model", "some steps")
    assert {each.verdict for each in falling if each.claim.startswith("Perplexity grows")} == {"inconclusive"}
    facts = {"dense attention": 80.0, LEARNED: 70.0, **dict.fromkeys(RULES.values(), 40.0)}
    assert [each.verdict for each in fact_findings([facts], "a model")] == ["does not hold", *["holds"] * 4]
    assert fact_findings([{**facts, "dense attention": 10.0}], "a model") == []
    draw_seer(good, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_exact_properties_hold():
    assert all(each.verdict == "holds" for each in exact_findings())
