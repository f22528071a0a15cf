"""Rectified block-sparse attention against its written-out form, its exact limits, and bad input."""

import pytest
import torch
import torch.nn.functional as F

from cenote.ops.block_estimate import select_blocks
from cenote.ops.rectified_attention import rectified_attention
from cenote.ops.space_filling_curve import block_neighbours, hilbert_order
from reference.rectified_attention import rectified, selection


def qkv(*shape, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


def dense(q, k, v, text_len=0, valid=None):
    mask = torch.ones(len(q), q.shape[2], dtype=torch.bool)
    for item, count in enumerate(valid if valid is not None else [text_len] * len(q)):
        mask[item, q.shape[2] - text_len + count :] = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])


CASES = [
    (32, 8, 0, None),
    (29, 8, 0, None),
    (3, 8, 0, None),
    (24, 4, 6, [6, 3, 0]),
    (21, 4, 5, [5, 1, 4]),
    (1, 1, 0, None),
]


@pytest.mark.parametrize(("visual", "block_size", "text_len", "valid"), CASES)
@pytest.mark.parametrize("compensate", ["gain", "all", "none"])
def test_equals_the_written_out_form(visual, block_size, text_len, valid, compensate):
    q, k, v = qkv(3, 2, visual + text_len, 8)
    k[:, :, visual:] *= 0.7
    text_valid = None if valid is None else torch.tensor(valid)
    result = rectified_attention(
        q, k, v, block_size=block_size, p=0.4, top_k=2, text_len=text_len, text_valid=text_valid,
        compensate=compensate, allow_padding=True,
    )  # fmt: skip
    blocks = result.block_mask.shape[-1]
    for item in range(3):
        for head in range(2):
            one = [x[item, head] for x in (q, k, v)]
            count = valid[item] if valid else 0
            kept = result.block_mask[item, head]
            out, probs = rectified(*one, block_size, kept, text_len, count, compensate)
            torch.testing.assert_close(result.probs[item, head], probs)
            torch.testing.assert_close(result.output[item, head], out)
            assert torch.equal(kept, selection(probs, 0.4, 2, blocks))


@pytest.mark.parametrize("mean", ["real", "padded"])
@pytest.mark.parametrize("limit", [{"p": 1.0}, {"top_k": 100, "p": 1e-6}])
@pytest.mark.parametrize(("visual", "block_size", "text_len", "valid"), CASES)
def test_keeping_everything_is_dense_attention(visual, block_size, text_len, valid, limit, mean):
    q, k, v = qkv(3, 2, visual + text_len, 8)
    text_valid = None if valid is None else torch.tensor(valid)
    result = rectified_attention(
        q, k, v, block_size=block_size, text_len=text_len, text_valid=text_valid, allow_padding=True, mean=mean, **limit
    )
    torch.testing.assert_close(result.output, dense(q, k, v, text_len, valid))
    assert (result.kept_mass == 1).all()
    assert not result.compensated.any()


def test_p_of_one_keeps_everything_whatever_the_sums_round_to():
    probs = torch.cat([torch.full((1, 1, 1, 900), 1.00001 / 900), torch.full((1, 1, 1, 100), 1e-12)], dim=-1)
    assert (probs.cumsum(-1) > 1).any()
    assert select_blocks(probs, 1.0, 1, 1000).all()


@pytest.mark.parametrize("text_len", [0, 8])
@pytest.mark.parametrize("visual", [64, 60])
def test_constant_blocks_make_the_estimate_exact(text_len, visual):
    def constant():
        blocks = torch.randn(2, 2, 8, 16, dtype=torch.float64).repeat_interleave(8, dim=2)[:, :, :visual]
        return torch.cat([blocks, torch.randn(2, 2, text_len, 16, dtype=torch.float64)], dim=2)

    q, k, v = constant(), constant(), constant()
    settings = {"block_size": 8, "p": 1e-6, "text_len": text_len, "allow_padding": True}
    expected = dense(q, k, v, text_len)
    for top_k in (1, 3, 6):
        all_back = rectified_attention(q, k, v, top_k=top_k, compensate="all", **settings)
        plain = rectified_attention(q, k, v, top_k=top_k, compensate="none", **settings)
        torch.testing.assert_close(all_back.output, expected)
        assert torch.equal(all_back.block_mask, plain.block_mask)
        assert (plain.output - expected)[:, :, :visual].abs().max() > 0.1


@pytest.mark.parametrize("text_len", [0, 8])
def test_masses_sum_to_one(text_len):
    q, k, v = qkv(2, 2, 48 + text_len, 8, dtype=torch.float32)
    result = rectified_attention(q, k, v, block_size=8, top_k=2, text_len=text_len)
    assert result.probs.shape[-1] == 6 + (text_len > 0)
    torch.testing.assert_close(result.probs.sum(-1), torch.ones(2, 2, 6))
    returned = (result.probs[..., :6] * result.compensated).sum(-1)
    torch.testing.assert_close(result.kept_mass + returned, torch.ones(2, 2, 6))
    assert not (result.compensated & result.block_mask).any()
    assert result.compensated.any()


def test_items_do_not_know_each_other_or_what_stands_on_padding():
    q, k, v = qkv(3, 2, 32 + 10, 8)
    valid = [10, 4, 0]
    for x in (k, v):
        x[1, :, 36:] = torch.nan
        x[2, :, 32:] = torch.inf
    before = [x.clone() for x in (q, k, v)]
    together = rectified_attention(q, k, v, block_size=8, top_k=1, text_len=10, text_valid=torch.tensor(valid))
    for x, y in zip((q, k, v), before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
    for item, count in enumerate(valid):
        one = [x[item : item + 1, :, : 32 + count] for x in (q, k, v)]
        alone = rectified_attention(*one, block_size=8, top_k=1, text_len=count)
        torch.testing.assert_close(together.output[item, :, : 32 + count], alone.output[0])


def test_the_means_of_a_ragged_block():
    q, k, v = qkv(1, 1, 12, 8)
    padded = [F.pad(x, (0, 0, 0, 4)) for x in (q, k, v)]
    official = rectified_attention(q, k, v, block_size=8, top_k=1, p=1e-6, mean="padded")
    whole = rectified_attention(*padded, block_size=8, top_k=1, p=1e-6)
    torch.testing.assert_close(official.probs, whole.probs)
    assert torch.equal(official.compensated, whole.compensated)
    real = rectified_attention(q, k, v, block_size=8, top_k=1, p=1e-6)
    logits = q[0, 0, :8].mean(0) @ torch.stack([k[0, 0, :8].mean(0), k[0, 0, 8:].mean(0)]).T * 8**-0.5
    torch.testing.assert_close(real.probs[0, 0, 0], (logits + torch.tensor([8.0, 4.0]).log()).softmax(0))


def test_neighbours_and_the_first_frame_are_always_kept():
    shape = (4, 4, 8)
    neighbours = block_neighbours(hilbert_order(shape), shape, 8)
    q, k, v = qkv(1, 2, 128, 8)
    bare = rectified_attention(q, k, v, block_size=8, top_k=1, p=1e-6).block_mask
    assert (bare.sum(-1) == 1).all()
    kept = rectified_attention(q, k, v, block_size=8, top_k=1, p=1e-6, neighbours=neighbours, first_frame_blocks=4)
    expected = bare | neighbours
    expected[..., :4, :4] = True
    assert torch.equal(kept.block_mask, expected)
    given = rectified_attention(q, k, v, block_size=8, block_mask=expected)
    assert torch.equal(given.output, kept.output)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_estimates_in_float32(dtype, error):
    q, k, v = (x.to(dtype) for x in qkv(2, 2, 72, 16, dtype=torch.float32))
    settings = {"block_size": 8, "top_k": 2, "text_len": 8}
    half = rectified_attention(q, k, v, **settings)
    wide = rectified_attention(q.float(), k.float(), v.float(), **settings)
    assert half.output.dtype == dtype
    assert half.probs.dtype == half.kept_mass.dtype == torch.float32
    assert torch.equal(half.probs, wide.probs)
    assert torch.equal(half.block_mask, wide.block_mask)
    torch.testing.assert_close(half.output.float(), wide.output, rtol=error, atol=error)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rectified_attention(q.float(), k.float(), v.float(), **settings)
    assert torch.equal(cast.probs, wide.probs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_len": 33}, r"text_len must lie in 0..31 for 32 tokens, got 33"),
        ({"text_len": 32}, "text_len"),
        ({"text_len": 8, "text_valid": torch.tensor([9, 1])}, r"text_valid must lie in 0..text_len = 8"),
        ({"text_len": 8, "text_valid": torch.tensor([-1, 1])}, "text_valid"),
        ({"text_len": 8, "text_valid": torch.tensor([1])}, "2 whole numbers"),
        ({"text_len": 6}, "multiple of block_size = 8, got 26"),
        ({"p": 0.0}, "p must lie"),
        ({"p": 1.1}, "p must lie"),
        ({"top_k": 0}, "top_k"),
        ({"block_size": 0}, "block_size"),
        ({"neighbours": torch.ones(3, 3, dtype=torch.bool)}, r"neighbours must be \(4, 4\), got \(3, 3\)"),
        ({"first_frame_blocks": 5}, "first_frame_blocks"),
        ({"block_mask": torch.ones(2, 2, 4, 5, dtype=torch.bool)}, "block_mask must be"),
        ({"block_mask": torch.zeros(2, 2, 4, 4, dtype=torch.bool)}, "at least one kept block"),
    ],
)
def test_bad_settings(settings, message):
    q, k, v = qkv(2, 2, 32, 8)
    with pytest.raises(ValueError, match=message):
        rectified_attention(q, k, v, **{"block_size": 8, **settings})


def test_heads_of_another_width_and_unknown_names():
    q, k, v = qkv(2, 2, 32, 8)
    with pytest.raises((ValueError, TypeError)):
        rectified_attention(q, k[..., :4], v, block_size=8)
    with pytest.raises(ValueError, match="compensate"):
        rectified_attention(q, k, v, block_size=8, compensate="some")
    with pytest.raises(ValueError, match="mean"):
        rectified_attention(q, k, v, block_size=8, mean="max")
