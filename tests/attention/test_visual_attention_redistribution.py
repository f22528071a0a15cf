"""VAR in a vision-language model and in a decoder with planted massive activations."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from attention_hosts import decoder, padded
from cenote.attention import VisualAttentionRedistribution
from cenote.attention.host import cache_argument, output_cache
from cenote.attention.sink_dimensions import find_sink_dimensions
from cenote.attention.visual_attention_redistribution import published

IMAGE = 60
SINKS = (7, 21)


@pytest.fixture(scope="module")
def planted():
    """A decoder whose tokens 1 (in front) and 50 (in the image) carry massive activations in two dimensions."""
    model = decoder("llama", num_hidden_layers=5)
    with torch.no_grad():
        for token in (1, 50):
            model.model.embed_tokens.weight[token, list(SINKS)] = 400.0
    return model


def llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.model.language_model.embed_tokens.weight[1, list(SINKS)] = 100.0
    return model


def prompt(left=2):
    """Two rows: four image tokens behind some text, the second padded on the left."""
    first = [1, 5, 6, *[IMAGE] * 4, 9, 10, 11, 12]
    second = [0] * left + [1, *[IMAGE] * 4, 20, 21, 22, 23]
    ids = torch.tensor([first, second])
    return ids, (ids != 0).long(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_a_vision_language_model_is_served_and_left_as_it_was():
    model = llava()
    ids, mask, pixels = prompt()
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    recipe = VisualAttentionRedistribution(SINKS, tau=4.0, rho=0.0, min_mass=0.0, first_layers=1)
    plain, text = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with recipe(model) as session:
        changed = model(**inputs).logits
        assert session.layers == {1, 2, 3}
        assert all(bool((moved[:, :, -1] > 0).all()) for moved in session.moved.values())
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(changed[0, :7], plain[0, :7])  # what stands before the text behind the image
    assert float((changed[0, 7:] - plain[0, 7:]).abs().max()) > 1e-4
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), text)
    assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"


def test_a_padded_row_is_as_its_own_run():
    model = llava()
    ids, mask, pixels = prompt()
    recipe = VisualAttentionRedistribution(SINKS, tau=4.0, rho=0.0, min_mass=0.0, first_layers=1)
    with recipe(model):
        both = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        alone = model(input_ids=ids[1:, 2:], pixel_values=pixels[1:]).logits
    torch.testing.assert_close(both[1, 2:], alone[0], atol=1e-4, rtol=1e-4)


def test_decoding_uses_the_sinks_of_the_prompt(planted):
    """Cached decoding equals running the whole sequence with the prompt's sinks: later sinks do not count."""
    ids = torch.tensor([[1, 5, 50, 8, 9, 12, 13, 14, 15, 16]])
    recipe = VisualAttentionRedistribution(SINKS, tau=4.0, rho=0.0, min_mass=0.0, image_span=(2, 3), first_layers=1)
    with recipe(planted), torch.no_grad():
        whole = planted(ids).logits[:, 6:]
        out = planted(ids[:, :7])
        steps = [out.logits[:, -1]]
        for place in range(7, 10):
            out = planted(ids[:, place : place + 1], **cache_argument(output_cache(out)))
            steps.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_the_search_finds_planted_dimensions(planted):
    ids, mask = padded((20, 14))
    ids[0, 0], ids[1, 6] = 1, 1
    batches = [{"input_ids": ids, "attention_mask": mask}]
    assert find_sink_dimensions(planted, batches, tau=4.0) == SINKS
    recipe = VisualAttentionRedistribution(tau=4.0, image_span=(1, 4)).calibrate(planted, batches)
    assert recipe.sink_dimensions == SINKS
    with pytest.raises(ValueError, match="no dimension"):
        find_sink_dimensions(decoder("llama"), batches)
    with pytest.raises(ValueError, match="no input"):
        find_sink_dimensions(planted, [])


def test_published_conventions_have_a_name():
    recipe = published((1, 2), rho=0.5)
    assert (recipe.moved, recipe.head_rule, recipe.needs_visual_sink, recipe.last_layers) == (
        0.4,
        "sink_share",
        True,
        0,
    )
    assert VisualAttentionRedistribution("llama-2-7b").sink_dimensions == (1415, 2533)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sink_dimensions": "llama-9"}, "known of"),
        ({"tau": 0.0}, "tau"),
        ({"moved": 1.5}, "moved"),
        ({"image_span": (0, 0)}, "image_span"),
        ({"head_rule": "all"}, "head_rule"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VisualAttentionRedistribution(**settings)


def test_what_a_model_lacks_is_said():
    model = decoder("llama")
    ids, _ = padded((9,))
    with (
        pytest.raises(ValueError, match="calibrate"),
        VisualAttentionRedistribution(image_span=(1, 2))(model),
    ):
        pass
    with pytest.raises(ValueError, match="no image token"), VisualAttentionRedistribution(SINKS)(model):
        pass
    with pytest.raises(ValueError, match="do not fit"), VisualAttentionRedistribution((99,), image_span=(1, 2))(model):
        pass
    with (
        VisualAttentionRedistribution(SINKS, image_span=(7, 5))(model),
        pytest.raises(ValueError, match="reaches beyond"),
    ):
        model(ids)
    cached = output_cache(model(ids))
    recipe = VisualAttentionRedistribution(SINKS, image_span=(1, 2), first_layers=1)
    with recipe(model), pytest.raises(ValueError, match="did not see the prompt"):
        model(ids[:, :1], **cache_argument(cached))
