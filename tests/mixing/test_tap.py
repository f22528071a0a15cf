"""TAP, alone, as a mixer and in the blocks of RVT and FAN: what holds whatever the weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cenote.mixing import MetaFormerBlock, MixerContext, create_mixer
from cenote.mixing.fan import FANBlock
from cenote.mixing.rvt import RVT, RVT_SIZES, RVTBlock
from cenote.mixing.softmax_attention import SoftmaxAttention
from cenote.mixing.tap import TAPBlock, TokenAwarePooling
from cenote.ops.dilated_average import dilated_average
from cenote.types import Grid

GRID = Grid(7, 9)


def randomise(module: nn.Module) -> nn.Module:
    """Batch norms that do something, in eval mode."""
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            nn.init.normal_(each.weight, 1, 0.3)
            nn.init.normal_(each.bias, 0, 0.3)
            each.running_mean.normal_(0, 0.3)
            each.running_var.uniform_(0.5, 2)
    return module.eval()


def force(tap: TokenAwarePooling, scale: int) -> None:
    """Make the predictor one-hot."""
    nn.init.zeros_(tap.proj[1].weight)
    nn.init.ones_(tap.proj[1].bias)
    nn.init.zeros_(tap.proj[2].weight)
    with torch.no_grad():
        tap.proj[2].weight[scale, :, 1, 1] = 1e4


def unfolded(x: torch.Tensor, dilation: int) -> torch.Tensor:
    """The nine neighbours side by side, as the official code takes their mean."""
    if dilation == 0:
        return x
    pieces = F.unfold(x, 3, dilation=dilation, padding=dilation).unflatten(1, (x.shape[1], 9))
    return pieces.mean(dim=2).unflatten(2, tuple(x.shape[2:]))


@pytest.mark.parametrize("dilation", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (2, 9)])
def test_dilated_average_is_the_mean_of_nine(dilation, shape):
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    torch.testing.assert_close(dilated_average(x, dilation), unfolded(x, dilation))
    as_last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(dilated_average(as_last, dilation), unfolded(x, dilation))


@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_average_over_cells_that_are_there(dilation):
    x = torch.randn(1, 2, 6, 5, dtype=torch.float64)
    keep = torch.rand(1, 6, 5) < 0.7
    expected = torch.zeros_like(x)
    for i in range(6):
        for j in range(5):
            near = [
                x[:, :, a, b]
                for a in (i - dilation, i, i + dilation)
                for b in (j - dilation, j, j + dilation)
                if 0 <= a < 6 and 0 <= b < 5 and keep[0, a, b]
            ]
            expected[:, :, i, j] = torch.stack(near).mean(dim=0) if near else 0
    found = dilated_average(x.masked_fill(~keep[:, None], float("nan")), dilation, count_include_pad=False, keep=keep)
    torch.testing.assert_close(found, expected)


def test_constant_map_stays_only_without_counted_padding():
    tap = randomise(TokenAwarePooling(8, 4, count_include_pad=False))
    x = torch.full((1, 8, 6, 6), 1.7)
    torch.testing.assert_close(tap.pool_map(x), x)
    counted = TokenAwarePooling(8, 4).eval()
    counted.load_state_dict(tap.state_dict())
    assert counted.pool_map(x)[0, 0, 0, 0] < 1.5


@pytest.mark.parametrize("scale", [0, 1, 3])
def test_one_hot_predictor_gives_plain_averages(scale):
    tap = TokenAwarePooling(6, 4).eval()
    force(tap, scale)
    x = torch.randn(2, 6, 7, 9)
    torch.testing.assert_close(tap.pool_map(x), unfolded(x, scale))


def test_shares_sum_to_one_and_follow_temperature():
    tap = randomise(TokenAwarePooling(6, 4))
    x = torch.randn(2, 6, *GRID)
    shares = tap.scale_probs(x)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(2, *GRID))
    hot = TokenAwarePooling(6, 4, temperature=1e6).eval()
    hot.load_state_dict(tap.state_dict())
    torch.testing.assert_close(hot.scale_probs(x), torch.full((2, *GRID, 4), 0.25), atol=1e-5, rtol=0)


def test_shift_commutes_away_from_borders():
    tap = randomise(TokenAwarePooling(6, 4))
    x = torch.randn(1, 6, 16, 16)
    shifted = tap.pool_map(x.roll((2, 1), dims=(2, 3)))
    # The predictor reads 2 cells away, averages 3; the shift wraps 2 more.
    inner = (slice(None), slice(None), slice(5, -3), slice(5, -3))
    torch.testing.assert_close(shifted[inner], tap.pool_map(x).roll((2, 1), dims=(2, 3))[inner])


def test_one_scale_is_the_host():
    attention = SoftmaxAttention(12, 3)
    host = MetaFormerBlock(attention)
    block = TAPBlock(attention, num_scales=1).eval()
    block.load_state_dict({**block.state_dict(), **host.state_dict()})
    x, context = torch.randn(2, 64, 12), MixerContext(grid=Grid(7, 9), prefix=1)
    assert torch.equal(block(x, None, context), host.eval()(x))
    mixer = create_mixer("tap(mixer='softmax_attention', num_scales=1, num_heads=3)", dim=12)
    mixer.mixer.load_state_dict(attention.state_dict())
    assert torch.equal(mixer(x, None, context), attention(x))


def test_block_pools_before_the_norm_and_mixer_behind_it():
    attention = SoftmaxAttention(12, 3)
    block = randomise(TAPBlock(attention, num_scales=3, feed_forward="none"))
    x, context = torch.randn(2, 63, 12), MixerContext(grid=GRID)
    tap = block.dilation_predictor
    torch.testing.assert_close(block(x, None, context), x + attention(block.norm1(tap(x, GRID))))
    mixer = create_mixer("tap(num_scales=3, num_heads=3)", dim=12).eval()
    mixer.mixer, mixer.dilation_predictor = attention, tap
    outer = MetaFormerBlock(mixer, feed_forward="none").eval()
    torch.testing.assert_close(outer(x, None, context), x + attention(tap(outer.norm1(x), GRID)))
    cells = x.transpose(1, 2).unflatten(2, tuple(GRID))
    as_map = TAPBlock(attention, num_scales=3, feed_forward="none", layout="map").eval()
    as_map.load_state_dict(block.state_dict())
    torch.testing.assert_close(as_map(cells).flatten(2).transpose(1, 2), block(x, None, context))


def test_prefix_tokens_stay_and_are_not_read():
    tap = randomise(TokenAwarePooling(6, 4))
    x = torch.randn(2, 2 + 63, 6)
    pooled = tap(x, GRID, prefix=2)
    assert torch.equal(pooled[:, :2], x[:, :2])
    torch.testing.assert_close(pooled[:, 2:], tap(x[:, 2:], GRID))


def test_masked_cells_are_as_if_the_map_ended():
    """A masked last row leaves what a smaller map gives, in eval and in the statistics of training."""
    for training in (False, True):
        tap = randomise(TokenAwarePooling(6, 3)).train(training)
        alone = TokenAwarePooling(6, 3).train(training)
        alone.load_state_dict(tap.state_dict())
        x = torch.randn(2, 63, 6)
        mask = (torch.arange(63) < 54).expand(2, -1)
        masked = tap(x.masked_fill(~mask[..., None], float("nan")), GRID, mask)
        torch.testing.assert_close(masked[:, :54], alone(x[:, :54], Grid(6, 9)))
        assert masked[:, 54:].abs().max() == 0
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(tap.state_dict()[name], value)


def test_synchronised_batch_norm_takes_masks_too():
    tap = randomise(TokenAwarePooling(6, 3))
    x, mask = torch.randn(2, 63, 6), (torch.arange(63) < 54).expand(2, -1)
    expected = tap(x, GRID, mask)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(tap)
    assert isinstance(synchronised.proj[1], nn.SyncBatchNorm)
    torch.testing.assert_close(synchronised(x, GRID, mask), expected)


@pytest.mark.parametrize("block_class", [RVTBlock, FANBlock])
def test_blocks_take_grids_that_are_not_square(block_class):
    block = randomise(block_class(12, 3, num_scales=3))
    x = torch.randn(2, 40, 12)
    mixed, weights = block(x, Grid(5, 8), return_weights=True)
    assert mixed.shape == x.shape
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 40))
    torch.testing.assert_close(block(x, Grid(5, 8)), mixed)
    assert not torch.allclose(block(x, Grid(8, 5)), mixed, atol=1e-3)
    with pytest.raises(ValueError, match="square"):
        block(x)


def test_position_mask_multiplies_the_logits():
    block = randomise(RVTBlock(12, 3, max_tokens=40))
    nn.init.normal_(block.attn.att_mask)
    x = torch.randn(2, 16, 12)
    query, key, _ = block.attn.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    logits = query @ key.transpose(-1, -2) / 2 * block.attn.att_mask[:, :16, :16].sigmoid()
    torch.testing.assert_close(block.attn(x, return_weights=True)[1], logits.softmax(dim=-1))
    again = RVTBlock.from_reference(block.state_dict(), dim=12, num_heads=3).eval()
    assert torch.equal(again(x), block(x))
    with pytest.raises(ValueError, match="holds 40 tokens, got 49"):
        block(torch.randn(1, 49, 12))


@pytest.mark.parametrize(("size", "millions"), [("tiny_plus", 10.9), ("small_plus", 23.3), ("base_plus", 89.1)])
def test_published_sizes_and_keys(size, millions):
    """RVT's own table for the first two; its 91.8 million for the last is more than the official code makes."""
    with torch.device("meta"):
        model = RVT(**RVT_SIZES[size])
    state = model.state_dict()
    dim = RVT_SIZES[size]["base_dims"][0] * RVT_SIZES[size]["heads"][0]
    heads = RVT_SIZES[size]["heads"][0]
    assert state["transformers.0.blocks.0.dilation_predictor.proj.0.weight"].shape == (4, dim, 3, 3)
    assert state["transformers.0.blocks.3.attn.att_mask"].shape == (heads, 196, 196)
    assert state["patch_embed.proj.3.weight"].shape == (dim, 32, 4, 4)
    assert ("pools.0.conv.weight" in state) == (size == "tiny_plus")
    added = sum(p.numel() for key, p in model.named_parameters() if "dilation_predictor" in key)
    total = sum(p.numel() for p in model.parameters())
    assert added == sum(36 * m.dim + 152 for m in model.modules() if isinstance(m, TokenAwarePooling))
    assert added / total < 0.01
    assert (total - added) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(("dim", "scales"), [(24, 1), (192, 4), (768, 3)])
def test_overhead(dim, scales):
    tap = TokenAwarePooling(dim, scales)
    assert sum(p.numel() for p in tap.parameters()) == 9 * dim * scales + 9 * scales**2 + 2 * scales
    assert sum(b.numel() for b in tap.buffers()) == 2 * scales + 1


def test_bad_input():
    with pytest.raises(ValueError, match="num_scales of at least 1"):
        TokenAwarePooling(8, 0)
    with pytest.raises(ValueError, match="positive temperature"):
        TokenAwarePooling(8, temperature=0)
    with pytest.raises(ValueError, match="grid of 7 x 9 needs 63 tokens, got 64"):
        TokenAwarePooling(8).eval()(torch.randn(1, 64, 8), GRID)
    with pytest.warns(UserWarning, match="grid of 3 x 9 cells no neighbour at dilation 3 lies inside along"):
        TokenAwarePooling(8).eval()(torch.randn(1, 27, 8), Grid(3, 9))
    with pytest.raises(ValueError, match="needs the grid"):
        TAPBlock(SoftmaxAttention(8)).eval()(torch.randn(1, 9, 8))
    with pytest.raises(ValueError, match="no recurrent form"):
        TAPBlock(SoftmaxAttention(8)).chunk(torch.randn(1, 9, 8))
    with pytest.raises(ValueError, match="expected 8"):
        create_mixer("tap", dim=8, mixer=SoftmaxAttention(16))
    with pytest.raises(ValueError, match="0 or more"):
        dilated_average(torch.zeros(1, 1, 2, 2), -1)
    with pytest.raises(ValueError, match="one entry a stage"):
        RVT((64,), (2, 2), (3,))
