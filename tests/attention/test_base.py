"""What every recipe inherits: nesting, refusals, restoring, saving."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from attention_hosts import decoder, padded
from cenote.attention import registry
from cenote.attention.base import _ACTIVE, Recipe, Session, refuse_unserved
from cenote.attention.cache import PreallocatedLayer
from cenote.attention.host import Host, cache_argument, output_cache
from cenote.attention.plan import LayerPlan
from cenote.integrations.attention_capture import AttentionCapture


@dataclass(frozen=True)
class Scaled(Recipe):
    """Multiplies what some layers attend to."""

    name: ClassVar[str] = "scaled"
    layers: tuple[int, ...] = (0,)
    factor: float = 2.0
    plan: LayerPlan | tuple[str | int, ...] = ("full",)
    gate: dict[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None

    def start(self, host: Host) -> Session:
        refuse_unserved(self.name, host, self.layers)
        recipe = self

        class Live(Session):
            def attend(self, call):
                return call.dense() * recipe.factor

        return Live(host, self.layers)


class Failing(Scaled):
    name: ClassVar[str] = "failing"

    def start(self, host):
        class Live(Session):
            def attend(self, call):
                raise RuntimeError("in the middle")

        return Live(host, (0,))


@pytest.fixture
def model():
    return decoder("llama")


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def test_layers_of_several_recipes_combine_and_the_model_comes_back(model):
    ids, _ = padded((9,))
    plain = logits(model, ids)
    hooks = {name: dict(part._forward_pre_hooks) for name, part in model.named_modules()}
    with Scaled((0,), 2.0)(model), Scaled((2,), 3.0)(model):
        both = logits(model, ids)
    with Scaled((0,), 2.0)(model):
        one = logits(model, ids)
    assert not torch.allclose(both, one)
    assert not torch.allclose(one, plain)
    assert torch.equal(logits(model, ids), plain)
    assert {name: dict(part._forward_pre_hooks) for name, part in model.named_modules()} == hooks
    assert model.config._attn_implementation == "sdpa"


def test_two_recipes_on_one_layer_are_refused_by_name(model):
    with (
        Scaled((0, 1))(model),
        pytest.raises(ValueError, match=r"scaled and scaled both change layers \[1\]"),
        Scaled((1, 2))(model),
    ):
        pass
    with Scaled((1, 2))(model):
        pass


def test_what_a_refused_recipe_changed_is_undone(model):
    ended = []

    class Ending(Scaled):
        def start(self, host):
            if self.factor == 0:
                raise ValueError("not this one")
            session = super().start(host)
            session.end = lambda: ended.append(self.factor)
            return session

    with Ending((0,), 2.0)(model):
        with pytest.raises(ValueError, match="cannot be nested"), Ending((0,), 3.0)(model):
            pass
        assert ended == [3.0]
    assert ended == [3.0, 2.0]
    with pytest.raises(ValueError, match="not this one"), Ending((0,), 0.0)(model):
        pass
    assert not _ACTIVE


def test_an_exception_restores_the_model(model):
    ids, _ = padded((9,))
    plain = logits(model, ids)
    with pytest.raises(RuntimeError, match="in the middle"), Failing()(model):
        logits(model, ids)
    assert torch.equal(logits(model, ids), plain)
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_maps_can_be_captured_around_a_recipe(model):
    ids, _ = padded((9,))
    with Scaled((0,), 2.0)(model):
        expected = logits(model, ids)
        with AttentionCapture(model) as seen:
            assert torch.equal(logits(model, ids), expected)
        assert len(seen.layers) == 4
        assert torch.equal(logits(model, ids), expected)


def test_what_a_recipe_cannot_serve_is_refused(model):
    ids, _ = padded((9,))
    with Scaled()(model):
        with pytest.raises(ValueError, match="no attention maps"):
            logits(model, ids, output_attentions=True)
        with pytest.raises(ValueError, match="no other mask"):
            logits(model, ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())
        packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        with pytest.raises(ValueError, match="no packed sequences"):
            logits(model, ids, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="no text decoder"), Scaled()(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(TypeError, match="transformers model"), Scaled()("llama"):
        pass
    windowed = decoder("mistral", sliding_window=4)
    with pytest.raises(ValueError, match=r"layer 0 \(a sliding window of 4\)"), Scaled()(windowed):
        pass


def test_dropout_is_refused_in_training_mode():
    model = decoder("llama", attention_dropout=0.5).train()
    with Scaled()(model), pytest.raises(ValueError, match="eval mode"):
        logits(model, padded((5,))[0])


def test_a_fresh_cache_gets_layers_of_ours_and_a_used_one_keeps_its_own(model):
    ids, _ = padded((9,))
    with Scaled((0,), 1.0)(model), torch.no_grad():
        cache = output_cache(model(ids, **cache_argument(DynamicCache(config=model.config))))
        assert all(type(layer) is PreallocatedLayer for layer in cache.layers)
        used = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **cache_argument(used))
    with Scaled((0,), 1.0)(model), torch.no_grad():
        model(ids, **cache_argument(used))
    assert not any(isinstance(layer, PreallocatedLayer) for layer in used.layers)
    assert used.get_seq_length() == 18


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_positions_can_be_taken_out_again(family):
    model = decoder(family)
    seen = {}

    @dataclass(frozen=True)
    class Look(Scaled):
        def start(self, host):
            class Live(Session):
                def attend(self, call):
                    seen[call.offset] = call.unrotated()
                    return call.dense()

            return Live(host, (1,))

    attention = model.model.layers[1].self_attn
    projected = {}
    target = attention.q_norm if family == "qwen3" else attention.q_proj
    other = attention.k_norm if family == "qwen3" else attention.k_proj
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: projected.setdefault(name, []).append(out))
        for name, part in (("q", target), ("k", other))
    ]
    ids, mask = padded((9, 6))
    with Look()(model), torch.no_grad():
        out = model(ids, attention_mask=mask)
        longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        model(ids[:, :1], attention_mask=longer, **cache_argument(output_cache(out)))
    for hook in hooks:
        hook.remove()
    for number, offset in enumerate((0, 9)):
        for name, found in zip("qk", seen[offset], strict=True):
            expected = projected[name][number].reshape(2, found.shape[2], -1, 8).transpose(1, 2)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_settings_and_tensors_come_back_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "recipe_class", lambda name: {"scaled": Scaled, "failing": Failing}[name])
    plan = LayerPlan(("full", "select", 1, 1))
    recipe = Scaled((0, 3), 1.5, plan, {"a": torch.randn(2), "b": torch.randn(3)}, torch.ones(4))
    recipe.save_pretrained(tmp_path)
    back = Recipe.from_pretrained(tmp_path)
    assert type(back) is Scaled
    assert (back.layers, back.factor, tuple(back.plan)) == ((0, 3), 1.5, plan.roles)
    assert torch.equal(back.bias, recipe.bias)
    assert back.gate.keys() == recipe.gate.keys()
    Scaled().save_pretrained(tmp_path)
    assert Scaled.from_pretrained(tmp_path).gate == {}
    with pytest.raises(ValueError, match="not a Failing"):
        Failing.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no recipe\.json"):
        Recipe.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe"):
        Recipe.from_pretrained(tmp_path)
