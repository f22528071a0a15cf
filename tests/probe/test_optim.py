"""Stacked optimisers against torch's own, one member at a time."""

import pytest
import torch

from cenote.probe.optim import LARS, SGD, AdamW, warmup_cosine

RATES = torch.tensor([0.1, 0.01, 0.003])


def gradients(step, shapes):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(3, *shape, generator=generator) for name, shape in shapes.items()}


SHAPES = {"weight": (4, 5), "bias": (4,), "queries": (2, 5)}


@pytest.mark.parametrize(
    ("stacked", "single", "options"),
    [
        (AdamW, torch.optim.AdamW, {"weight_decay": 0.0}),
        (AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
        (
            SGD,
            lambda p, lr, weight_decay: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=weight_decay),
            {"weight_decay": 0.0},
        ),
    ],
)
def test_every_member_follows_torch(stacked, single, options):
    params = gradients(99, SHAPES)
    if options["weight_decay"]:
        params = {k: v for k, v in params.items() if k != "bias"}  # torch decays one-axis tensors, the stack does not
    shapes = {k: SHAPES[k] for k in params}
    factor = torch.tensor([1.0, 10.0, 3.0])
    alone = []
    for k in range(3):
        own = {name: p[k].clone().requires_grad_() for name, p in params.items()}
        groups = [{"params": [p], "lr": float(RATES[k] * (factor[k] if n == "queries" else 1))} for n, p in own.items()]
        alone.append((own, single(groups, lr=1.0, **options)))
    optimizer = stacked(params, RATES, {"queries": factor}, **options)
    for step in range(5):
        grads = gradients(step, shapes)
        optimizer.step(grads)
        for k, (own, reference) in enumerate(alone):
            for name, p in own.items():
                p.grad = grads[name][k].clone()
            reference.step()
    for k, (own, _) in enumerate(alone):
        for name, p in own.items():
            torch.testing.assert_close(params[name][k], p.detach(), rtol=1e-5, atol=1e-6)


def test_lars_scales_matrices_by_their_own_norms_only():
    params = gradients(7, SHAPES)
    before = {name: p.clone() for name, p in params.items()}
    grads = gradients(8, SHAPES)
    LARS(params, RATES).step(grads)
    for k, rate in enumerate(RATES):
        for name in SHAPES:
            g, p = grads[name][k], before[name][k]
            scale = 0.001 * p.norm() / g.norm() if p.ndim > 1 else 1.0
            torch.testing.assert_close(params[name][k], p - rate * scale * g, rtol=1e-5, atol=1e-7)


def test_lars_leaves_a_zero_tensor_unscaled():
    params, grads = {"w": torch.zeros(1, 2, 3)}, {"w": torch.ones(1, 2, 3)}
    LARS(params, torch.tensor([0.5])).step(grads)
    torch.testing.assert_close(params["w"], torch.full((1, 2, 3), -0.5))


def test_schedule_warms_up_and_ends_at_its_minimum():
    assert warmup_cosine(0.0, 10, 2) == 0.0
    assert warmup_cosine(1.0, 10, 2) == 0.5
    assert warmup_cosine(2.0, 10, 2) == 1.0
    assert warmup_cosine(6.0, 10, 2) == pytest.approx(0.5)
    assert warmup_cosine(10.0, 10, 2, minimum=0.25) == pytest.approx(0.25)


def test_saved_state_resumes_exactly():
    first = gradients(1, SHAPES)
    optimizer = AdamW(first, RATES)
    optimizer.step(gradients(2, SHAPES))
    second = {name: p.clone() for name, p in first.items()}
    resumed = AdamW(second, RATES)
    resumed.load_state_dict({k: v.clone() for k, v in optimizer.state_dict().items()})
    optimizer.step(gradients(3, SHAPES))
    resumed.step(gradients(3, SHAPES))
    for name in SHAPES:
        assert torch.equal(first[name], second[name])
