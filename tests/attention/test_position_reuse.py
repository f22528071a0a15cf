import pytest
import torch

from attention_hosts import decoder, padded
from cenote.attention.base import Recipe
from cenote.attention.host import Host
from cenote.attention.plan import LayerPlan
from cenote.attention.position_reuse import PositionReuse, visible_keys
from cenote.compress.teacher_forced import teacher_forced_logits
from cenote.ops.gather_attention import Positions


class Given(PositionReuse):
    """Selecting layers hand on whatever ``sets`` says and attend densely; calls are noted."""

    def __init__(self, host, plan, sets):
        super().__init__(host, plan)
        self.sets, self.calls = sets, []

    def attend(self, call):
        self.calls.append((call.layer, call.queries, self.sparse(call)))
        return super().attend(call)

    def select(self, call):
        return call.dense(), self.sets(call)


class Reuse(Recipe):
    name = "test_reuse"

    def __init__(self, plan, sets):
        object.__setattr__(self, "plan", LayerPlan(plan))
        object.__setattr__(self, "sets", sets)

    def start(self, host: Host):
        return Given(host, self.plan, self.sets)


def everything(call):
    seen = visible_keys(call)
    kept = torch.ones(len(call.query), call.keys, dtype=torch.bool) if seen is None else seen
    return Positions.from_mask(kept.unsqueeze(1).expand(-1, call.query.shape[1], -1))


def every_other(call):
    kept = call.real & ((torch.arange(call.keys) % 2 == 0) | (torch.arange(call.keys) == call.offset))
    return Positions.from_mask(kept.unsqueeze(1).expand(-1, call.key.shape[1], -1))


def test_only_steps_are_sparse_and_full_layers_are_left_alone():
    model = decoder()
    ids, _ = padded((12,))
    with Reuse(("full", "select", 1, "full"), everything)(model) as session:
        teacher_forced_logits(model, ids, prompt=10)
    assert session.calls == [(1, 10, False), (2, 10, False), *[(1, 1, True), (2, 1, True)] * 2]


def test_sets_of_everything_are_dense_with_padding():
    model = decoder()
    ids, mask = padded((20, 9))
    dense = teacher_forced_logits(model, ids, mask.bool(), prompt=14)
    with Reuse(("select", 0, 0, 0), everything)(model):
        torch.testing.assert_close(
            teacher_forced_logits(model, ids, mask.bool(), prompt=14), dense, rtol=1e-4, atol=1e-5
        )


def test_layers_reuse_their_own_source_with_their_own_keys_and_values():
    """Sets a key-value head: the reusing layers equal a dense model whose mask hides what was not chosen."""
    model = decoder()
    ids, _ = padded((16, 16))
    with Reuse(("select", 0, "select", 2), lambda call: every_other(call) if call.layer else everything(call))(model):
        got = teacher_forced_logits(model, ids, prompt=15)[:, 1]
    hidden = torch.zeros(1, 1, 16, 16).masked_fill(torch.ones(16, 16).triu(1).bool(), float("-inf"))
    last = hidden.clone()
    last[:, :, 15, 1:15:2] = float("-inf")

    def masks(module, args, kwargs):
        return args, {**kwargs, "attention_mask": last if module.layer_idx == 3 else hidden}

    hooks = [layer.self_attn.register_forward_pre_hook(masks, with_kwargs=True) for layer in model.model.layers]
    expected = model(ids).logits[:, -1]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (got - model(ids).logits[:, -1]).abs().max() > 1e-3


def test_sets_do_not_outlive_the_pass():
    model = decoder()
    ids, _ = padded((12,))
    with Reuse(("select", 0, 0, 0), everything)(model) as session:
        teacher_forced_logits(model, ids, prompt=10)
        assert session.chosen[0].index.shape[-1] == 12
        model(ids)
        assert not session.chosen


def test_what_a_step_sees_is_named_only_where_something_is_hidden():
    model = decoder()
    ids, mask = padded((12, 7))
    seen = []

    def sets(call):
        seen.append(visible_keys(call))
        return everything(call)

    with Reuse(("select", 0, 0, 0), sets)(model):
        teacher_forced_logits(model, ids, prompt=11)
        teacher_forced_logits(model, ids, mask.bool(), prompt=11)
    assert seen[0] is None
    assert torch.equal(seen[1], mask.bool())


@pytest.mark.parametrize("plan", [("select", 0, 0), ("full", 0, "select", 2)])
def test_plans_that_do_not_fit_are_refused(plan):
    model = decoder()
    with (
        pytest.raises(ValueError, match=r"the plan is for 3 layers|not a select layer"),
        Reuse(plan, everything)(model),
    ):
        pass
