"""The claims about RSQ that need no trained model, and that the worlds for the others are what they say."""

import pytest
import torch

from attention_hosts import decoder
from cenote.reproductions import available, rsq
from cenote.reproductions.rsq_exact import exact_findings
from cenote.reproductions.rsq_layer import layer_findings
from cenote.reproductions.rsq_models import Subject, with_outliers


def test_it_is_offered():
    assert "rsq" in available()
    assert rsq.REPRODUCTION.slug == "rsq"


def test_exact_claims_hold():
    found = exact_findings()
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}
    assert len({f.claim for f in found}) == len(found) == 10


def test_claims_on_a_layer_hold():
    found = layer_findings((0, 1))
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}


@pytest.mark.parametrize("heads", [(4, 2, 12), (6, 6, 8)])
def test_outliers_leave_the_function_alone(heads):
    sizes = dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads, strict=True))
    model = decoder("llama", **sizes)
    hurt = with_outliers(model, 20.0, 0.1, 0)
    ids = torch.randint(2, 64, (2, 12))
    torch.testing.assert_close(hurt(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    weights = (each.model.layers[0].mlp.down_proj.weight.abs().max() for each in (hurt, model))
    assert next(weights) > 5 * next(weights)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary():
    model = decoder("llama")
    model.lm_head.weight.data.zero_()
    subject = Subject("nothing", model, *(torch.randint(2, 64, (100,)) for _ in range(3)), length=16)
    assert subject.perplexity(model, subject.test) == pytest.approx(64, rel=1e-4)


def test_comparisons_are_signed_changes_of_perplexity():
    run = {"RTN": [2.0], "GPTQ": [1.5], "rotated GPTQ": [1.4], "RSQ": [1.41]}
    found = rsq.comparisons("a model", 3, run, "")
    assert [f.verdict for f in found] == ["does not hold", "holds", "holds", "holds"]
    assert found[0].values[0] == pytest.approx(100 * (torch.tensor(0.01).exp().item() - 1), rel=1e-3)
