"""A stack of readouts against the same readouts one by one."""

import pytest
import torch
from torch import nn

from cenote.pooling import create_pooling, list_poolings
from cenote.probe.heads import BN_EPS, Member, StackedReadout
from cenote.probe.plan import default_options

MEMBERS = [Member(0.1, 1.0, seed) for seed in (3, 4, 5)]
DIM, GRID = 16, (3, 3)


def make(name):
    import inspect

    from cenote.pooling.registry import pooling_class

    options = default_options(name, DIM)
    parameters = inspect.signature(pooling_class(name)).parameters
    if "grid" in parameters:
        options["grid"] = GRID
    if "num_layers" in parameters:
        options["num_layers"] = 2
    return create_pooling(name, dim=DIM, **options)


def trainable():
    return [name for name in list_poolings() if any(True for _ in make(name).parameters())]


def inputs(pooling, batch=5):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 9, DIM) if pooling.layers == "last" else (batch, 2, 9, DIM)
    return torch.randn(shape, generator=generator)


def doubled(stack):
    stack.params = {name: p.detach().double().requires_grad_() for name, p in stack.params.items()}
    stack.stats = {name: s.double() if s.is_floating_point() else s for name, s in stack.stats.items()}
    stack.template.double()
    return stack


@pytest.mark.parametrize("name", trainable())
@pytest.mark.parametrize("training", [True, False])
def test_stack_equals_members_one_by_one(name, training):
    """In float64: batch norm over five items amplifies rounding."""
    stack = doubled(StackedReadout(lambda: make(name), MEMBERS, 4))
    tokens = inputs(stack.template).double()
    weights = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
    singles = [stack.member(stack.state(), k) for k in range(3)]
    stack.train(training)
    outputs = stack(tokens)
    (outputs * weights).sum().backward()
    for k, (pooling, norm, head) in enumerate(singles):
        for module in (pooling, norm, head):
            module.double().train(training)
            module.load_state_dict(
                {n: v.double() if v.is_floating_point() else v for n, v in module.state_dict().items()}
            )
        expected = head(norm(pooling(tokens)))
        torch.testing.assert_close(outputs[k], expected, rtol=1e-4, atol=1e-4)
        (expected * weights).sum().backward()
        for parameter, p in pooling.named_parameters():
            got = stack.params[f"pooling.{parameter}"].grad
            wanted = torch.zeros_like(p) if p.grad is None else p.grad
            got = torch.zeros_like(p) if got is None else got[k]
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()) + 1e-6)
        if training:
            state = stack.state()
            torch.testing.assert_close(state["norm.mean"][k], norm.running_mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(state["norm.var"][k], norm.running_var, rtol=1e-4, atol=1e-6)
            for buffer, b in pooling.named_buffers():
                torch.testing.assert_close(state[f"pooling.{buffer}"][k], b, rtol=1e-4, atol=1e-5)


def test_members_of_one_seed_start_alike_and_others_do_not():
    stack = StackedReadout(
        lambda: make("efficient_probing"), [Member(0.1, 1, 0), Member(0.2, 1, 0), Member(0.1, 1, 1)], 4
    )
    queries = stack.params["pooling.queries"]
    assert torch.equal(queries[0], queries[1])
    assert not torch.equal(queries[0], queries[2])


def test_masked_stack_ignores_padding():
    stack = StackedReadout(lambda: make("efficient_probing"), MEMBERS, 4).eval()
    tokens = inputs(stack.template)
    mask = torch.arange(9)[None] < torch.tensor([9, 1, 4, 7, 2])[:, None]
    noisy = torch.where(mask[..., None], tokens, 1e3)
    torch.testing.assert_close(stack(noisy, mask), stack(tokens, mask))
    torch.testing.assert_close(stack(noisy, mask)[:, 2], stack(tokens[2:3, :4])[:, 0], rtol=1e-5, atol=1e-5)


def test_keep_and_load_go_on_with_the_right_members():
    stack = StackedReadout(lambda: make("efficient_probing"), MEMBERS, 4).eval()
    tokens = inputs(stack.template)
    before = stack(tokens)
    stack.keep([2, 0])
    torch.testing.assert_close(stack(tokens), before[[2, 0]])
    saved = stack.state()
    with torch.no_grad():
        stack.params["head.bias"].add_(1.0)
    stack.load(saved)
    torch.testing.assert_close(stack(tokens), before[[2, 0]])


def test_batch_norm_matches_torch_in_training():
    stack = StackedReadout(lambda: make("efficient_probing"), MEMBERS, 4).train()
    tokens = inputs(stack.template, batch=7)
    pooled, _ = stack.pool(tokens, None)
    reference = nn.BatchNorm1d(DIM, eps=BN_EPS, affine=False).train()
    torch.testing.assert_close(stack._norm(pooled)[1], reference(pooled[1]), rtol=1e-4, atol=1e-5)
