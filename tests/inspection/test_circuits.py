"""KQ and OV of real attention modules: they give the module's own scores and output."""

import pytest
import torch
from torch import nn

from cenote.inspection.circuits import attention_circuits
from cenote.mixing.softmax_attention import SoftmaxAttention
from cenote.ops.circuits import split_heads


def rebuilt(circuits, tokens):
    """Bidirectional attention from circuits alone: scores ``scale k^T KQ q``, outputs ``sum_h OV_h sum_l a_l t_l``."""
    scores = circuits.scale * torch.einsum("bkd,hde,bqe->bhqk", tokens, circuits.kq, tokens)
    read = scores.softmax(dim=-1) @ tokens[:, None]
    return torch.einsum("bhqd,hod->bqo", read, circuits.ov)


def without_biases(module):
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=0.3)  # far enough from uniform attention
    return module.eval()


def agrees(module, attend, dim):
    tokens = torch.randn(2, 5, dim)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(attention_circuits(module), tokens), attend(tokens), atol=1e-4, rtol=1e-4)


def test_this_library():
    module = without_biases(SoftmaxAttention(12, num_heads=3))
    agrees(module, module, 12)


def test_torch():
    module = without_biases(nn.MultiheadAttention(12, 3, batch_first=True))
    agrees(module, lambda x: module(x, x, x)[0], 12)


def test_timm():
    timm = pytest.importorskip("timm")
    module = without_biases(timm.create_model("test_vit").blocks[0].attn)
    agrees(module, module, 64)


SMALL = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8}


@pytest.mark.parametrize("kind", ["ViT", "Bert", "CLIPText", "Dinov2", "Wav2Vec2"])
def test_transformers_encoders(kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config" if kind != "CLIPText" else "CLIPTextConfig")(
        **SMALL, **({"num_conv_pos_embedding_groups": 2} if kind == "Wav2Vec2" else {}), attn_implementation="eager"
    )
    model = getattr(transformers, f"{kind}Model")(config)
    if kind == "Bert":
        module = without_biases(model.encoder.layer[0].attention)

        def attend(x):
            return module.output.dense(module.self(x)[0])
    else:
        owners = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "q_proj")]
        module = without_biases(owners[0])

        def attend(x):
            return module(x)[0]

    agrees(module, attend, 24)


def test_gpt2_keeps_its_weights_the_other_way_round():
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2Model(transformers.GPT2Config(n_embd=24, n_head=4, n_layer=1, attn_implementation="eager"))
    module = without_biases(model.h[0].attn)
    tokens = torch.randn(1, 5, 24)
    with torch.no_grad():
        last = module(tokens)[0][:, -1]  # the last token sees all, so that causality does not show
    torch.testing.assert_close(rebuilt(attention_circuits(module), tokens)[:, -1], last, atol=1e-4, rtol=1e-4)


def test_grouped_queries_share_keys_and_values():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=30, attn_implementation="eager")
    module = without_biases(transformers.LlamaModel(config).layers[0].self_attn)
    tokens = torch.randn(1, 5, 24)
    still = (torch.ones(1, 5, 6), torch.zeros(1, 5, 6))  # rotations by nothing
    with torch.no_grad():
        last = module(tokens, position_embeddings=still, attention_mask=None)[0][:, -1]
    circuits = attention_circuits(module)
    assert circuits.kq.shape == circuits.ov.shape == (4, 24, 24)
    assert torch.equal(circuits.key[0], circuits.key[1])
    assert not torch.equal(circuits.key[1], circuits.key[2])
    torch.testing.assert_close(rebuilt(circuits, tokens)[:, -1], last, atol=1e-4, rtol=1e-4)


def test_one_head_by_hand():
    q, k, v, o = (torch.randn(4, 6) if i < 3 else torch.randn(6, 4) for i in range(4))
    circuits = split_heads(q, k, v, o, 2)
    torch.testing.assert_close(circuits.kq[1], k[2:].T @ q[2:])
    torch.testing.assert_close(circuits.ov[0], o[:, :2] @ v[:2])
    assert circuits.scale == pytest.approx(2**-0.5)
    assert split_heads(q, k, v, o, 2, scale=0.25).scale == 0.25


def test_bad_input():
    q, o = torch.randn(6, 5), torch.randn(5, 6)
    with pytest.raises(ValueError, match="query projection's width 6 does not split into 4 heads"):
        split_heads(q, q, q, o, 4)
    with pytest.raises(ValueError, match="must divide the heads"):
        split_heads(q, q, q, o, 3, 2)
    with pytest.raises(ValueError, match="differ in width"):
        split_heads(q, q[:3], q, o, 3)
    with pytest.raises(ValueError, match="give num_heads"):
        attention_circuits(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no output projection"):
        attention_circuits(nn.Linear(3, 3), num_heads=1)
    with pytest.raises(ValueError, match="does not split"):
        attention_circuits(nn.MultiheadAttention(6, 2), num_heads=4)
    transformers = pytest.importorskip("transformers")
    small = transformers.GPTNeoXConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                       num_attention_heads=2)  # fmt: skip
    with pytest.raises(ValueError, match="interleave heads"):
        attention_circuits(transformers.GPTNeoXModel(small).layers[0].attention)
