"""HyLRA's claims that hold whatever the model, and the parts that the statistical ones are made of."""

from dataclasses import replace

import pytest
import torch

from attention_hosts import decoder
from cenote.attention import LayerPlan
from cenote.attention.hylra import HyLRA
from cenote.reproductions import available, hylra
from cenote.reproductions.hylra_cost import Decoding, layer_costs
from cenote.reproductions.hylra_exact import exact_findings
from cenote.reproductions.hylra_models import Judge, Quality, Trained, calibration, evaluation, evenly, rivals

RECIPE = HyLRA(top_k=24, chunk_size=4, first=1, last=2, threshold=0, sparsity=0.7, compute_ratio=0.2, steps=4)


@pytest.fixture(scope="module")
def trained():
    text = torch.randint(2, 64, (700,), generator=torch.Generator().manual_seed(0))
    return Trained("a random model", decoder(num_hidden_layers=6), text, 100, RECIPE)


def test_it_is_offered():
    assert "hylra" in available()
    assert hylra.REPRODUCTION.slug == "hylra"


def test_exact_claims_hold(trained):
    found = exact_findings(trained.model, evaluation(trained, 0, 2))
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}
    assert len({f.claim for f in found}) == len(found) == 10


def test_pieces_to_calibrate_on_and_to_judge_by_differ(trained):
    fitted, judged = calibration(trained, 3)[0]["input_ids"], evaluation(trained, 3, 4)
    assert fitted.shape == (2, 68)
    assert judged.shape == (4, 100)
    assert not any(torch.equal(a, b[:68]) for a in fitted for b in judged)
    assert not torch.equal(evaluation(trained, 4, 4), judged)


def test_rivals_cost_as_much_as_the_plan():
    plan = LayerPlan(("select", "full", "full", "select", 3, 3, "select", 6))
    others = rivals(plan, seed=1)
    for each in (others.even, others.uniform, *others.sources, *others.plans):
        assert [len(each.layers(role)) for role in ("full", "select", "reuse")] == [2, 3, 3]
    assert others.uniform.layers("full") == (0, 1)
    assert others.even.layers("full") == (1, 2)
    assert others.even.layers("select") == (0, 4, 6)
    assert plan not in others.sources
    assert rivals(plan, seed=1) == others
    assert rivals(plan, seed=2).plans != others.plans
    assert evenly(range(2, 8), 3) == [2, 4, 6]


def test_a_plan_that_keeps_everything_is_judged_as_dense(trained):
    judge = Judge(replace(trained, recipe=replace(RECIPE, top_k=104)), seed=0, texts=2)
    kept = judge(LayerPlan(("select",) * 6))
    assert kept.nll == pytest.approx(judge.dense.nll, abs=1e-5)
    assert kept.divergence == pytest.approx(0, abs=1e-6)
    assert judge.dense.divergence == 0


def test_findings_judge_the_lead_over_rivals(trained):
    run = hylra.measure(trained, 0, 2)
    assert run.own != run.planned
    assert run.overlap.shape == (2, 6, 6)
    assert run.chance == pytest.approx(24 / 70.5)
    worse, alike = Quality(run.planned.nll + 0.1, 1.0), Quality(run.planned.nll + 0.001, 1.0)
    ahead = replace(run, dense=run.planned, even=alike, uniform=worse, sources=worse, plans=worse)
    verdicts = [f.verdict for f in hylra.quality_findings(trained, [ahead])][:6]
    assert verdicts == ["holds"] * 6
    behind = replace(ahead, even=Quality(run.planned.nll - 0.1, 0), sources=alike)
    verdicts = [f.verdict for f in hylra.quality_findings(trained, [behind])][:3]
    assert verdicts == ["does not hold", "holds", "does not hold"]
    rising = torch.eye(6).repeat(2, 1, 1)
    rising.diagonal(offset=1, dim1=1, dim2=2).copy_(torch.tensor([0.9, 0.5, 0.6, 0.7, 0.8]))
    found = hylra.overlap_findings(trained, [replace(run, overlap=rising, chance=0.25)])
    assert [f.verdict for f in found] == ["holds", "holds"]
    assert found[0].measured == pytest.approx(0.7 / 0.25)


def test_the_figure_shows_the_matrix(trained, tmp_path):
    found = hylra.overlap_findings(trained, [hylra.measure(trained, 0, 1)])
    hylra.draw_hylra(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_what_is_timed_computes_the_layer():
    costs = layer_costs(640, heads=2, head_dim=16, share=1.0)
    torch.testing.assert_close(costs.dense(), costs.reuse())
    torch.testing.assert_close(costs.dense(), costs.select())
    decoding = Decoding(512, layers=4, heads=1, share=1.2)
    dense = decoding.steps(count=2)
    torch.testing.assert_close(decoding.steps(decoding.plan(2), count=2), dense, atol=1e-4, rtol=1e-4)
    assert decoding.cache.get_seq_length() == 512
    assert decoding.plan(2).roles == ("full", "select", 1, 1)
