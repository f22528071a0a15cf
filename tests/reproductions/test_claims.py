"""The exact claims of the reproductions hold, and their generated data is what it says."""

from functools import partial

import pytest
import torch

from cenote.reproductions import available, ggem, spp
from cenote.reproductions import efficient_probing as ep
from cenote.reproductions.attentive_exact import exact_findings as attentive_findings
from cenote.reproductions.base import finding
from cenote.reproductions.fitting import Labelled, Parts, converged_accuracy, trained_accuracy
from cenote.reproductions.golden import golden_findings
from cenote.reproductions.planted import CLASSES, one_token_among, planted_parts, two_kinds_of_evidence
from cenote.reproductions.rows_figure import draw_rows
from cenote.reproductions.run import load_reproduction
from cenote.reproductions.small_cnn import SmallCNN, accuracy, resize, train_cnn


@pytest.mark.parametrize("slug", ["efficient-probing", "ggem", "spp"])
def test_each_is_offered_with_its_own_claim(slug):
    assert slug in available()
    assert load_reproduction(slug).claim


@pytest.mark.parametrize("findings", [attentive_findings, ggem.exact_findings, partial(spp.exact_findings, 7)])
def test_exact_claims_hold(findings):
    found = findings()
    assert len(found) > 8
    assert [(each.claim, each.values) for each in found if each.verdict != "holds"] == []


def test_reference_files_are_met_and_all_counted():
    (one,) = golden_findings("efficient-probing")
    assert one.verdict == "holds"
    assert 0 < one.measured <= 1  # float32 rounding is there, so zero would mean that nothing was compared
    assert one.note.count("efficient-probing") == 16


def test_all_epochs_together_are_one_pass():
    assert ep._one_pass(epochs=2).values == (1.0,)


def test_two_kinds_of_evidence():
    tokens, targets = two_kinds_of_evidence(8000, 0)
    assert tokens.shape == (8000, 16, 16)
    first, second = targets % 2 == 1, targets // 2 == 1
    assert bool((tokens >= 0).all())
    # The first bit is one token of channel 0 above what the noise can reach; nothing else of the group exceeds 1.
    assert torch.equal((tokens[:, :, 0] >= 1.5).sum(dim=1), first.long())
    assert tokens[:, :, 1:8].max() <= 1
    assert tokens[~first][:, :, 0].max() <= 1
    # The second bit is a shift of the whole of channel 8, whose noise has mean and deviation 1.
    assert tokens[second][:, :, 8].min() >= 0.45
    shift = tokens[second][:, :, 8].mean() - tokens[~second][:, :, 8].mean()
    assert shift.item() == pytest.approx(0.45, abs=0.03)
    assert tokens[:, :, 9:].std().item() == pytest.approx(1, abs=0.02)
    assert tokens[:, :, 9:].mean().item() == pytest.approx(1, abs=0.02)
    half = two_kinds_of_evidence(2000, 0, noise=0.5).tokens[:, :, 9:]
    assert half.mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.bincount(targets).min() > 8000 / CLASSES * 0.9


def test_one_token_among_distractors():
    tokens, targets = one_token_among(7)(4000, 1)
    assert tokens.shape == (4000, 8, 32)
    # Moved by 5 out of a deviation of 1, the telling token is nearly always the largest in channel 0.
    telling = tokens[torch.arange(4000), tokens[:, :, 0].argmax(dim=1)]
    assert (telling[:, 1:5].argmax(dim=1) == targets).double().mean() > 0.9
    assert torch.bincount(tokens[:, :, 0].argmax(dim=1)).min() > 4000 / 8 * 0.75
    assert telling[:, 5:].mean().abs() < 0.02


def test_parts_of_planted_data_differ_and_repeat():
    parts, again, other = (planted_parts(one_token_among(3), seed, 40, 20) for seed in (0, 0, 1))
    assert [len(part.targets) for part in parts] == [40, 10, 20]
    assert torch.equal(parts.train.tokens, again.train.tokens)
    assert not torch.equal(parts.train.tokens, other.train.tokens)
    assert not torch.equal(parts.train.tokens[:20], parts.test.tokens)


def test_heads_find_what_is_planted_and_rates_reach_the_named_parameter():
    parts = planted_parts(one_token_among(2), 0, 600, 400)
    assert converged_accuracy(parts, lambda x: x[:, 0]) < 75  # one token of three says it a third of the time
    fit = trained_accuracy(
        parts, "efficient_probing", lrs=(1e-6, 1e-2), query_factors=(10.0,), seeds=(0, 1), epochs=8, num_queries=4
    )
    assert min(fit.accuracies) > 85
    assert (len(fit.poolings), fit.lr, fit.query_factor) == (2, 1e-2, 10.0)
    exponents = [
        trained_accuracy(parts, "gem", lrs=(1e-3,), epochs=2, rate_factors=factors).poolings[0].p.item() - 3
        for factors in (None, {"p": 50.0})
    ]
    assert abs(exponents[1]) > 10 * abs(exponents[0]) > 0


def test_a_probe_that_does_not_converge_is_not_called_converged(monkeypatch):
    parts = planted_parts(one_token_among(2), 0, 60, 20)
    fit = type("Fit", (), {"converged": False, "penalty": 1.0})()
    monkeypatch.setattr("cenote.reproductions.fitting.fit_linear", lambda *a, **k: fit)
    with pytest.raises(RuntimeError, match="did not converge"):
        converged_accuracy(parts, lambda x: x.mean(dim=1))


def test_a_cnn_with_a_pyramid_takes_any_size_and_learns():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(2, (160,), generator=generator)
    images = torch.randn(160, 1, 8, 8, generator=generator) * 0.3
    images[targets == 1, :, :4] += 2.0
    data = Labelled(images, targets)
    network = train_cnn(data, "spp", (8, 6), seed=0, epochs=5)
    assert accuracy(network, data, 8) > 95
    assert network(resize(images, 11)).shape == (160, 10)
    with pytest.raises(RuntimeError):
        SmallCNN("flatten", 8)(resize(images, 11))


def test_figure_of_rows(tmp_path):
    findings = [
        finding("a costs $5", "1", [1.0, 2.0], lambda v: v > 1, unit="%"),
        finding("b", "1", 1.0, lambda v: True, unit="%"),
        finding("c", "1", 1.0, lambda v: True, unit="x"),
    ]
    for number, drawn in enumerate((findings, findings[1:])):
        draw_rows(drawn, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def test_parts_can_be_read_anew():
    part = Labelled(torch.arange(6.0).view(1, 2, 3), torch.tensor([1]))
    assert torch.equal(Parts(part, part, part).read(lambda x: x[:, 1:]).test.tokens, torch.tensor([[[3.0, 4.0, 5.0]]]))
