"""The claims of deconstructed attention that need no training."""

import pytest

from cenote.catalog import find
from cenote.integrations.deconstructed_qwen2 import DeconstructedQwen2ForCausalLM
from cenote.reproductions import available, deconstructing_attention
from cenote.reproductions.base import Settings
from cenote.reproductions.deconstructing_attention_exact import exact_findings
from cenote.reproductions.deconstructing_attention_worlds import COPYING, RECALL, Language, learnt_accuracy


def test_it_is_offered():
    assert "deconstructing-attention" in available()
    assert deconstructing_attention.REPRODUCTION.slug == "deconstructing-attention"
    assert find("deconstructing-attention").load() is DeconstructedQwen2ForCausalLM


def test_exact_claims_hold():
    # The time of a step is no matter of a test.
    found = [f for f in exact_findings() if f.unit != "x the time"]
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}
    assert len({f.claim for f in found}) == len(found) == 13


def test_accuracy_claims_name_their_bounds(monkeypatch):
    accuracies = {"standard": 0.96, "RndEmbQK": 0.34, "StaticEmbQK": 0.36}
    monkeypatch.setattr(
        deconstructing_attention, "learnt_accuracy", lambda task, variants, seed: accuracies.get(variants, 0.5)
    )
    monkeypatch.setattr(deconstructing_attention, "exact_findings", list)
    found = deconstructing_attention.run(Settings(quick=True, seeds=(0, 1)))
    verdicts = {f.claim: f.verdict for f in found if "recall" in f.claim}
    assert list(verdicts.values()) == ["does not hold", "holds", "holds", "does not hold", "does not hold"]
    assert all(len(f.values) == 2 for f in found)
    assert found[0].claim.startswith("[RndEmbQK, standard]: above 0.95 at recall of 6 pairs")
    full = deconstructing_attention.run(Settings(quick=False, seeds=(0,)))
    assert "[Approximate, Approximate] 0.50" in full[0].note


def test_language_claims_compare_losses():
    run = {
        "standard": Language(1.7, None), "MLP": Language(2.5, None), "RndEmbQK": Language(2.0, None),
        "StaticEmbQK": Language(1.9, None), "hybrid RndEmbQK": Language(1.75, 3.0),
        "hybrid Non-approximate": Language(1.85, 2.5),
    }  # fmt: skip
    found = deconstructing_attention.language_findings([run])
    values = {f.claim: f.values[0] for f in found}
    assert values["On letters RndEmbQK has a smaller loss than MLP."] == pytest.approx(0.5)
    assert values["Without its simple layers the trained hybrid RndEmbQK is lost."] == pytest.approx(1.25)
    assert [f.verdict for f in found] == ["holds"] * 6 + ["does not hold"] * 2


def test_training_is_repeatable_and_ends_where_chance_is_for_the_mlp():
    short = COPYING._replace(steps=5)
    assert learnt_accuracy(short, "RndEmbQK", 1) == learnt_accuracy(short, "RndEmbQK", 1)
    assert learnt_accuracy(RECALL._replace(steps=3), "MLP", 0) < 0.1
