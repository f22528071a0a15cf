import pytest
import torch
from transformers import MistralConfig, MistralModel

from cenote.integrations.nv_embed import load_nv_embed_state
from reference.latent_heads import latent_attention, random_state

TEXT = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LATENT = {"num_latents_value": 5, "num_cross_heads": 3, "hidden_dim": 24, "latent_dim": 24, "cross_dim_head": 16}


def checkpoint(text=TEXT):
    torch.manual_seed(0)
    model = MistralModel(MistralConfig(**text))
    state = {f"embedding_model.{name}": value for name, value in model.state_dict().items()}
    return state | {f"latent_attention_model.{name}": value for name, value in random_state(24, 5, 3, 16).items()}


def test_both_halves():
    state = checkpoint()
    model, pool = load_nv_embed_state(state, {"text": {**TEXT, "sliding_window": 2}, "latent": LATENT})
    ids, mask = torch.arange(3, 15).view(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        states = model(ids, attention_mask=mask).last_hidden_state
        head = {k.removeprefix("latent_attention_model."): v for k, v in state.items() if k.startswith("latent")}
        expected = latent_attention(head, states, mask.bool(), 3)
        torch.testing.assert_close(pool(states, mask.bool()), expected, rtol=1e-5, atol=1e-5)
        # The window in the settings has no effect, and a row alone gives the same states.
        alone = model(ids[1:, :4]).last_hidden_state
    torch.testing.assert_close(states[1:, :4], alone, rtol=1e-4, atol=1e-5)
    assert not model.training
    assert not pool.training


def test_training_the_result_leaves_the_checkpoint_alone():
    state = checkpoint()
    before = {name: value.clone() for name, value in state.items()}
    model, pool = load_nv_embed_state(state, {"text_config": TEXT, "latent_attention_config": LATENT})
    with torch.no_grad():
        for parameter in [*model.parameters(), *pool.parameters()]:
            parameter.zero_()
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_published_sizes():
    """Shapes of the released checkpoints: 7.85 G parameters."""
    text = {"vocab_size": 32000, "sliding_window": 4096}
    with torch.device("meta"):
        host = MistralModel(MistralConfig(**text)).state_dict()
        head = {
            "latents": (512, 4096),
            **{f"cross_attend_blocks.{name}.{part}": (4096,) for name in ("0.norm", "0.norm_context", "1.norm")
               for part in ("weight", "bias")},
            "cross_attend_blocks.0.fn.to_q.weight": (32768, 4096),
            "cross_attend_blocks.0.fn.to_kv.weight": (65536, 4096),
            "cross_attend_blocks.0.fn.to_out.weight": (4096, 32768),
            "cross_attend_blocks.1.fn.net.0.weight": (32768, 4096),
            "cross_attend_blocks.1.fn.net.0.bias": (32768,),
            "cross_attend_blocks.1.fn.net.2.weight": (4096, 16384),
            "cross_attend_blocks.1.fn.net.2.bias": (4096,),
        }  # fmt: skip
        head = {name: torch.empty(shape) for name, shape in head.items()}
    state = {f"embedding_model.{k}": v for k, v in host.items()}
    state |= {f"latent_attention_model.{k}": v for k, v in head.items()}
    latent = {"num_latents_value": 512, "num_cross_heads": 8, "hidden_dim": 4096, "latent_dim": 4096}
    model, pool = load_nv_embed_state(state, {"text_config": text, "latent_attention_config": latent})
    assert {name for name in state if name.startswith("embedding_model.layers.31.")} >= {
        f"embedding_model.layers.31.{part}.weight" for part in ("self_attn.q_proj", "mlp.gate_proj", "input_layernorm")
    }
    count = sum(p.numel() for module in (model, pool) for p in module.parameters())
    assert count == pytest.approx(7.85e9, rel=1e-3)


def test_bad_input():
    state = checkpoint()
    config = {"text": TEXT, "latent": LATENT}
    with pytest.raises(ValueError, match=r"got 'lm_head\.weight'"):
        load_nv_embed_state({**state, "lm_head.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="needs text"):
        load_nv_embed_state(state, {"latent": LATENT})
    with pytest.raises(ValueError, match="do not fit the text settings"):
        load_nv_embed_state(state, {**config, "text": {**TEXT, "num_hidden_layers": 3}})
    with pytest.raises(ValueError, match="latent_dim must equal"):
        load_nv_embed_state(state, {**config, "latent": {**LATENT, "latent_dim": 16}})
