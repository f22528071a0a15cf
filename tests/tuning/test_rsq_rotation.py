"""Rotation leaves a model's logits alone, for every family, number of heads and orthogonal matrix."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from attention_hosts import decoder, padded
from cenote.ops.hadamard import hadamard_matrix
from cenote.tuning.rsq_rotation import OnlineHadamard, fuse_norms, random_rotation, rotate_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def _messy(family, **sizes):
    """A model whose norms and biases are not those of a fresh one."""
    model = decoder(family, **sizes)
    for name, value in model.named_parameters():
        if "norm" in name or "bias" in name:
            value.data += 0.3 * torch.randn_like(value)
    return model


@pytest.mark.parametrize("rotation", ["residual", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family, rotation):
    model = _messy(family)  # 6 heads of 8: no Hadamard matrix of order 6
    ids, mask = padded((9, 5))
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        if rotation == "full":
            with pytest.raises(ValueError, match="number of heads 6"):
                rotate_model(model, random_rotation(48, "hadamard", 0), rotation)
            model = _messy(family, num_attention_heads=12, num_key_value_heads=4, head_dim=4)
            before = model(ids, attention_mask=mask).logits
        rotate_model(model, random_rotation(48, "hadamard", 0), rotation)
        after = model(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(after[real], before[real], rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "head_dim"),
    [(48, 12, 12, 4), (40, 2, 1, 20), (64, 8, 2, 8), (48, 4, 2, 16), (24, 12, 6, 2)],
)
def test_full_rotation_holds_for_every_number_of_heads(hidden, heads, kv_heads, head_dim):
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    model = _messy("qwen2", **sizes, intermediate_size=172)
    ids, _ = padded((12,))
    with torch.no_grad():
        before = model(ids).logits
        rotate_model(model, random_rotation(hidden, "orthogonal", 1), "full")
        after = model(ids).logits
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
        torch.testing.assert_close(copy.deepcopy(model)(ids).logits, after)  # hooks are copied with the model


def test_tied_embeddings_are_untied():
    model = _messy("llama", tie_word_embeddings=True)
    ids, _ = padded((12,))
    with torch.no_grad():
        before = model(ids).logits
        rotate_model(model, random_rotation(48, "orthogonal", 0))
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False


def test_centring_embeddings_changes_a_model_with_rms_norm():
    model = _messy("llama")
    ids, _ = padded((12,))
    with torch.no_grad():
        before = model(ids).logits
        fuse_norms(model, center_embeddings=True)
        assert (model(ids).logits - before).abs().max() > 0.01 * before.abs().max()
    assert model.model.embed_tokens.weight.mean(1).abs().max() < 1e-6


def test_rotation_spreads_outlier_channels():
    model = _messy("llama")
    model.model.embed_tokens.weight.data[:, 3] *= 100
    peak = model.model.embed_tokens.weight.abs().max()
    rotate_model(model, random_rotation(48, "hadamard", 0))
    assert model.model.embed_tokens.weight.abs().max() < peak / 3


def test_online_hadamard_works_on_blocks():
    x = torch.randn(2, 3, 24)
    (out,) = OnlineHadamard(4, after=6)(torch.nn.Identity(), (x,))
    matrix = torch.kron(hadamard_matrix(4) / 2, torch.eye(6, dtype=torch.float64)).float()
    torch.testing.assert_close(out, x @ matrix)


def test_hosts_and_matrices_that_do_not_fit_are_refused():
    q = random_rotation(48, "orthogonal", 0)
    with pytest.raises(ValueError, match="GemmaRMSNorm is not a plain RMSNorm"):
        rotate_model(_messy("gemma"), q)
    layer_norm = _messy("llama")
    layer_norm.model.norm = torch.nn.LayerNorm(48)
    with pytest.raises(ValueError, match="LayerNorm would need its mean baked"):
        rotate_model(layer_norm, q)
    with pytest.raises(ValueError, match="orthogonal matrix of the model's width 48"):
        rotate_model(_messy("llama"), q * 1.1)
    with pytest.raises(ValueError, match="orthogonal matrix of the model's width 48"):
        rotate_model(_messy("llama"), random_rotation(44, "orthogonal", 0))
    with pytest.raises(ValueError, match="transform='orthogonal'"):
        random_rotation(50, "hadamard", 0)
    with pytest.raises(ValueError, match="transform must be"):
        random_rotation(48, "spin", 0)
    with pytest.raises(ValueError, match="rotation must be"):
        rotate_model(_messy("llama"), q, "half")
    other = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match="built like Llama"):
        rotate_model(other, q)
