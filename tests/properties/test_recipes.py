"""What every recipe must do, whatever it computes: on every family, padded, in ``generate``, and leaving no trace."""

import copy

import pytest
import torch

from attention_hosts import FAMILIES, decoder, padded
from cenote.attention.base import Recipe
from cenote.attention.host import cache_argument, output_cache
from cenote.attention.registry import create_recipe, list_recipes, recipe_class
from properties.recipe_options import DENSE, SPARSE

RECIPES = list_recipes()
LENGTHS = (21, 34, 13)


def ready(name, settings, model):
    """The recipe with those settings, calibrated on a few random tokens where it has something to learn."""
    ids, mask = padded((90, 90), seed=5)
    recipe = create_recipe(settings[name])
    torch.manual_seed(0)
    return recipe.calibrate(model, [{"input_ids": ids, "attention_mask": mask}])


def logits(model, ids, mask=None, **more):
    with torch.no_grad():
        return model(ids, attention_mask=mask, **more).logits


def decoded(model, ids, mask, prompt):
    """Logits of the real tokens from the prompt's last one on: a pass of the prompt, then a token a step."""
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)  # as ``generate`` counts them
        out = model(
            ids[:, :prompt], attention_mask=mask[:, :prompt], position_ids=places[:, :prompt], use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        found, cache = [out.logits], output_cache(out)
        for step in range(prompt, ids.shape[1]):
            new = slice(step, step + 1)
            out = model(
                ids[:, new], attention_mask=mask[:, : step + 1], position_ids=places[:, new], **cache_argument(cache)
            )
            found.append(out.logits)
    return torch.cat(found, dim=1)


def generated(model, ids, mask, **how):
    torch.manual_seed(1)
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, **how)


def test_every_recipe_is_known_here():
    assert set(DENSE) == set(SPARSE) == set(RECIPES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RECIPES)
def test_the_dense_limit_is_the_model_itself(name, family):
    model = decoder(family)
    recipe = ready(name, DENSE, model)
    ids, mask = padded(LENGTHS)
    plain, steps = logits(model, ids, mask), decoded(model, ids, mask, 26)
    with recipe(model):
        torch.testing.assert_close(logits(model, ids, mask)[mask.bool()], plain[mask.bool()], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(decoded(model, ids, mask, 26), steps, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_a_row_does_not_see_its_padding_or_its_mates(name):
    model = decoder("qwen2")
    recipe = ready(name, SPARSE, model)
    ids, mask = padded(LENGTHS)
    with recipe(model):
        together, steps = logits(model, ids, mask), decoded(model, ids, mask, 28)
        for row, length in enumerate(LENGTHS):
            alone = ids[row : row + 1, -length:]
            torch.testing.assert_close(together[row, -length:], logits(model, alone)[0], atol=2e-4, rtol=1e-4)
            single = decoded(model, alone, torch.ones_like(alone), length - 6)
            torch.testing.assert_close(steps[row], single[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_the_sparse_settings_do_something(name):
    model = decoder("llama")
    recipe = ready(name, SPARSE, model)
    ids, mask = padded(LENGTHS)
    plain, steps = logits(model, ids, mask)[mask.bool()], decoded(model, ids, mask, 28)
    with recipe(model):
        changed = logits(model, ids, mask)[mask.bool()], decoded(model, ids, mask, 28)
    difference = max(float((a - b).abs().max()) for a, b in zip((plain, steps), changed, strict=True))
    assert difference > 1e-3
    assert all(bool(part.isfinite().all()) for part in changed)


@pytest.mark.parametrize("how", ["greedy", "sampling", "beams", "static"])
@pytest.mark.parametrize("name", RECIPES)
def test_generate_does_what_decoding_step_by_step_does(name, how):
    """Greedy tokens are those of step-by-step decoding; a static cache and one beam change nothing; sampling and
    beams in the dense limit are those of the model."""
    model = decoder("llama")
    ids, mask = padded(LENGTHS)
    if how in ("sampling", "beams"):
        options = {"do_sample": True} if how == "sampling" else {"num_beams": 3}
        plain = generated(model, ids, mask, **options)
        with ready(name, DENSE, model)(model):
            assert torch.equal(generated(model, ids, mask, **options), plain)
        return
    with ready(name, SPARSE, model)(model):
        options = {"cache_implementation": "static"} if how == "static" else {}
        found = generated(model, ids, mask, do_sample=False, **options)
        longer = torch.cat([mask, torch.ones(len(mask), 8, dtype=mask.dtype)], dim=1)
        steps = decoded(model, found[:, :-1], longer[:, :-1], ids.shape[1])
    assert torch.equal(found[:, ids.shape[1] :], steps.argmax(-1))


@pytest.mark.parametrize("name", RECIPES)
def test_beams_follow_their_own_past(name):
    """The best beam scores what its own tokens score when they are decoded alone."""
    model = decoder("llama")
    ids, mask = padded((21, 34))
    with ready(name, SPARSE, model)(model):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False, output_scores=True,
            return_dict_in_generate=True, length_penalty=1.0,
        )  # fmt: skip
        longer = torch.cat([mask, torch.ones(2, 6, dtype=mask.dtype)], dim=1)
        steps = decoded(model, out.sequences[:, :-1], longer[:, :-1], ids.shape[1]).log_softmax(-1)
    own = steps.gather(-1, out.sequences[:, ids.shape[1] :, None]).squeeze(-1).sum(1) / 6
    torch.testing.assert_close(out.sequences_scores, own, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_bfloat16_stays_near_float32(name):
    model = decoder("llama")
    recipe = ready(name, DENSE, model)
    ids, mask = padded(LENGTHS)
    half = copy.deepcopy(model).bfloat16()
    plain = decoded(half, ids, mask, 28).float()
    with recipe(half):
        found = decoded(half, ids, mask, 28)
    assert found.dtype == torch.bfloat16
    scale = plain.abs().mean()
    assert float((found.float() - plain).abs().mean()) < 0.05 * float(scale)


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_comes_back_bit_for_bit(name):
    model = decoder("llama")
    recipe = ready(name, SPARSE, model)
    ids, mask = padded(LENGTHS)
    plain = logits(model, ids, mask)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {path: set(vars(part)) for path, part in model.named_modules()}

    def fail():
        with recipe(model):
            decoded(model, ids, mask, 28)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(logits(model, ids, mask), plain)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {path: set(vars(part)) for path, part in model.named_modules()} == attributes
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(part, hook) for part in model.modules() for hook in hooks)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_recipe_does_the_same(name, tmp_path):
    model = decoder("llama")
    recipe = ready(name, SPARSE, model)
    ids, mask = padded(LENGTHS)
    recipe.save_pretrained(tmp_path)
    back = Recipe.from_pretrained(tmp_path)
    assert type(back) is recipe_class(name)
    with recipe(model):
        expected = decoded(model, ids, mask, 28)
    with back(model):
        torch.testing.assert_close(decoded(model, ids, mask, 28), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_single_token_is_served(name):
    model = decoder("llama")
    ids = torch.tensor([[7]])
    plain = logits(model, ids)
    recipe = ready(name, SPARSE, model)
    if getattr(recipe, "image_span", None) is not None:
        with recipe(model), pytest.raises(ValueError, match="reaches beyond the tokens"):
            logits(model, ids)
        return
    with recipe(model):
        torch.testing.assert_close(logits(model, ids), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_windows_are_refused_or_left_alone(name):
    model = decoder("mistral", sliding_window=8)
    ids, mask = padded(LENGTHS)
    plain = logits(model, ids, mask)
    try:
        with create_recipe(DENSE[name]).calibrate(model, [{"input_ids": ids, "attention_mask": mask}])(model):
            torch.testing.assert_close(logits(model, ids, mask)[mask.bool()], plain[mask.bool()], atol=2e-4, rtol=1e-4)
    except ValueError as error:
        assert "sliding window" in str(error) or "plain causal" in str(error)  # noqa: PT017
