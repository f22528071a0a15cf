"""Test-time regressors in the attention's place of a decoder: padding on the left, and decoding from a cache."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cenote.integrations.local_attention import register_local_attention
from cenote.integrations.replace_mixer import replace_mixer

IDS = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(2, 9, dtype=torch.long)
LEFT[1, :4] = 0
RULES = ["gated_delta", "ridge", "local_linear", "gated_delta, ridge, local_linear"]


def host(rule):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    replace_mixer(model, rule, options={"num_heads": 4, "num_kv_heads": 2})
    return model


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_cached_decoding_equals_the_whole_sequence(rule):
    model = host(rule)
    whole = model(IDS, use_cache=False).logits
    cache, parts = DynamicCache(config=model.config), []
    for part in IDS.split([4, 1, 1, 3], dim=1):
        parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_generation_behind_left_padding_is_that_of_the_tokens_alone(rule):
    model = host(rule)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = model.generate(IDS, attention_mask=LEFT, **settings)
    alone = model.generate(IDS[1:, 4:], attention_mask=LEFT[1:, 4:], **settings)
    assert torch.equal(batch[1, 4:], alone[0])
    sure = model(batch, attention_mask=torch.nn.functional.pad(LEFT, (0, 6), value=1), use_cache=False).logits
    assert torch.equal(sure[:, 8:-1].argmax(-1), batch[:, 9:])


@pytest.mark.parametrize("windows", [{}, {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}])
@torch.no_grad()
def test_local_regression_in_the_place_of_a_hosts_softmax(windows):
    """Of degree 0, and of degree 1 with a large ridge, it is the host's own attention; with a small one it is not."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **windows,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.mul_(8 if parameter.ndim == 2 else 1)  # so that attention is not flat
    given = {"input_ids": IDS, "attention_mask": LEFT, "position_ids": (LEFT.cumsum(1) - 1).clamp(min=0)}
    settings = {"attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    real = LEFT.bool()
    before, said = model(**given).logits[real], model.generate(IDS, **settings)
    for name in (
        register_local_attention("cenote_constant", degree=0),
        register_local_attention("cenote_flat", ridge=1e9),
    ):
        model.set_attn_implementation(name)
        torch.testing.assert_close(model(**given).logits[real], before, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(IDS, **settings), said)
    model.set_attn_implementation(register_local_attention("cenote_sloped", ridge=0.1))
    assert float((model(**given).logits[real] - before).abs().max()) > 0.1
    batch = model.generate(IDS, **settings)
    settings["attention_mask"] = LEFT[1:, 4:]
    assert torch.equal(model.generate(IDS[1:, 4:], **settings)[0], batch[1, 4:])


def test_what_local_regression_cannot_do_for_a_host_is_refused():
    config = Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation(register_local_attention("cenote_sloped"))
    model.eval()(IDS)
    with pytest.raises(ValueError, match="cannot do what Qwen2Attention asks for: dropout"):
        model.train()(IDS)
