"""The pooling mixer and its relatives, and networks built of them."""

import pytest
import torch
import torch.nn.functional as F

from cenote.mixing import MetaFormerBlock, MixerContext, create_mixer
from cenote.mixing.poolformer import SIZES, StagedMetaFormer, poolformer
from cenote.ops.box_mean import box_mean
from cenote.types import Grid

PARAMETERS = {"s12": 11_915_176, "s24": 21_388_968, "s36": 30_862_760, "m36": 56_172_520, "m48": 73_473_448}
MILLIONS = {"id_s12": 11.9, "pppa_s12_224": 14.0, "ppaa_s12_224": 16.5}


def tiny(**settings) -> StagedMetaFormer:
    model = StagedMetaFormer(**{"layers": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5, **settings})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=0.3 if parameter.ndim == 1 else 0.0, std=0.2)
    return model.eval()


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", [(2, 3, 9, 6), (1, 2, 2, 1), (1, 4, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_box_mean_is_average_pooling_that_does_not_count_padding(size, shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    wanted = F.avg_pool2d(x, size, stride=1, padding=size // 2, count_include_pad=False)
    torch.testing.assert_close(box_mean(x, size), wanted)


def test_box_mean_of_a_masked_map_takes_real_cells_alone():
    x, keep = torch.randn(2, 3, 5, 4), torch.rand(2, 5, 4) < 0.6
    keep[:, 0, 0] = True
    x = x.masked_fill(~keep[:, None], float("nan"))
    means = box_mean(x, 3, keep)
    for b in range(2):
        for i in range(5):
            for j in range(4):
                rows, columns = slice(max(i - 1, 0), i + 2), slice(max(j - 1, 0), j + 2)
                real = x[b, :, rows, columns][:, keep[b, rows, columns]]
                wanted = real.mean(dim=1) if real.shape[1] else torch.zeros(3)
                torch.testing.assert_close(means[b, :, i, j], wanted)


def test_pool_equals_fixed_depthwise_convolution_away_from_borders():
    x, pool = torch.randn(2, 4, 8, 7), create_mixer("pool(pool_size=5)", dim=4)
    kernel = torch.full((4, 1, 5, 5), 1 / 25)
    kernel[:, :, 2, 2] -= 1
    torch.testing.assert_close(pool.mix_map(x)[..., 2:-2, 2:-2], F.conv2d(x, kernel, groups=4))


def test_pool_of_a_constant_map_and_of_window_one_is_zero():
    constant = torch.randn(2, 4, 1, 1).expand(2, 4, 6, 5)
    assert create_mixer("pool", dim=4).mix_map(constant).abs().max() <= 1e-6
    assert create_mixer("pool(pool_size=1)", dim=4).mix_map(torch.randn(2, 4, 6, 5)).abs().max() == 0


@pytest.mark.parametrize("turn", [lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.rot90(1, (2, 3))])
def test_pool_commutes_with_flips_and_turns(turn):
    x, pool = torch.randn(2, 4, 6, 5), create_mixer("pool", dim=4)
    torch.testing.assert_close(pool.mix_map(turn(x)), turn(pool.mix_map(x)), rtol=0, atol=1e-6)


def test_tokens_with_a_prefix_are_pooled_on_their_grid():
    tokens, pool = torch.randn(2, 1 + 12, 4), create_mixer("pool", dim=4)
    mixed = pool(tokens, None, MixerContext(grid=Grid(3, 4), prefix=1))
    wanted = pool.mix_map(tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 4))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(mixed[:, 1:], wanted)
    assert not mixed[:, 0].any()


def test_random_matrix_is_a_frozen_softmax_that_is_over_real_cells_alone():
    mixer = create_mixer("random_matrix", dim=3, grid=(2, 3))
    assert [p.requires_grad for p in mixer.parameters()] == [False]
    weights = mixer.scores.softmax(dim=-1)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(6))
    ratio = weights.amax(dim=1) / weights.amin(dim=1)
    assert ratio.max() <= torch.e  # R lies between 0 and 1
    tokens, mask = torch.randn(1, 6, 3), torch.tensor([[True, True, False, True, False, True]])
    torch.testing.assert_close(mixer(tokens, None, MixerContext(grid=Grid(2, 3))), weights @ tokens)
    mixed = mixer(tokens, mask, MixerContext(grid=Grid(2, 3)))
    kept = mixer.scores[:, mask[0]].softmax(dim=-1)  # the softmax over real cells alone
    torch.testing.assert_close(mixed[0, mask[0]], (kept @ tokens[0, mask[0]])[mask[0]])


def test_spatial_fc_is_one_matrix_over_positions_for_all_channels():
    mixer, x = create_mixer("spatial_fc", dim=3, grid=(2, 4)), torch.randn(2, 3, 2, 4)
    wanted = torch.einsum("mn,bcn->bcm", mixer.fc.weight, x.flatten(2)).unflatten(2, (2, 4))
    torch.testing.assert_close(mixer.mix_map(x), wanted)


@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_inference_agrees_with_the_plain_path(kind, monkeypatch):
    monkeypatch.setattr("cenote.mixing.feed_forward.ROWS", 7)
    model, x = tiny(feed_forward=kind), torch.randn(3, 3, 40, 33)
    plain = model(x)  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)


def test_hooks_see_whole_maps_in_inference():
    model, seen = tiny(), []
    model.network[0][0].mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert [tuple(each.shape) for each in seen] == [(2, 32, 8, 8)]
    assert (seen[0] < -0.5).any()  # before the activation


def test_items_do_not_depend_on_their_batch():
    model, x = (
        tiny(mixers=["pool", "pool*1", "pool, identity", "softmax_attention(head_dim=16)"]),
        torch.randn(3, 3, 64, 64),
    )
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_layer_scale_of_zero_makes_blocks_identities_and_none_means_one():
    x = torch.randn(2, 8, 5, 5)
    still = MetaFormerBlock(create_mixer("pool", dim=8), layout="map", norm="group", layer_scale=0.0)
    assert torch.equal(still(x), x)
    plain = MetaFormerBlock(create_mixer("pool", dim=8), layout="map", norm="group")
    ones = MetaFormerBlock(create_mixer("pool", dim=8), layout="map", norm="group", layer_scale=1.0)
    ones.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(ones(x), plain(x))
    assert plain.layer_scale_1 is None


def test_block_with_scale_one_is_an_average_pooling_of_the_normed_input_plus_what_the_norm_takes():
    block = MetaFormerBlock(create_mixer("pool", dim=8), layout="map", norm="none", feed_forward="none")
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(block(x), F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def test_shift_of_the_first_norm_never_matters():
    x = torch.randn(2, 8, 5, 6)
    block = MetaFormerBlock(create_mixer("pool", dim=8), layout="map", norm="group", layer_scale=1.0)
    before = block(x)
    torch.nn.init.normal_(block.norm1.bias)
    torch.testing.assert_close(block(x), before)


@pytest.mark.parametrize(
    ("size", "maps"),
    [
        ((64, 96), [(16, 24), (8, 12), (4, 6), (2, 3)]),
        ((70, 90), [(17, 22), (9, 11), (5, 6), (3, 3)]),
        ((32, 33), [(8, 8), (4, 4), (2, 2), (1, 1)]),
    ],
)
def test_dense_outputs_have_strides_4_8_16_32(size, maps):
    model = tiny(fork_feat=True)
    with torch.no_grad():
        out = model(torch.randn(1, 3, *size))
        raw = model.forward_stages(torch.randn(1, 3, *size))
    assert [tuple(each.shape[2:]) for each in out] == maps == [tuple(each.shape[2:]) for each in raw]
    assert [each.shape[1] for each in out] == [8, 16, 24, 32]
    assert {key.partition(".")[0] for key in model.state_dict()} == {
        "patch_embed", "network", "norm0", "norm2", "norm4", "norm6",
    }  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_of_the_sizes(name):
    with torch.device("meta"):
        model = poolformer(f"poolformer_{name}")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(set(SIZES) - set(PARAMETERS)))
def test_published_hybrids(name):
    with torch.device("meta"):
        model = poolformer(name)
        assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == MILLIONS.get(name, round(count / 1e6, 1))
    # 21 million frozen numbers where the paper replaces pooling by random matrices.
    with torch.device("meta"):
        frozen = poolformer("s12", mixers=[f"random_matrix(grid=({n}, {n}))" for n in (56, 28, 14, 7)])
    assert sum(p.numel() for p in frozen.parameters() if not p.requires_grad) // 10**6 == 21


def test_published_settings():
    model = poolformer("m36")
    rates = [block.drop_rate for end in model.stage_ends for block in model.network[end]]
    assert rates == pytest.approx([0.3 * j / 35 for j in range(36)])
    first = model.network[0][0]
    assert torch.equal(first.layer_scale_1, torch.full((96,), 1e-6))
    assert first.norm1.eps == 1e-5
    assert first.token_mixer.pool_size == 3
    assert first.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not first.mlp.fc1.bias.any()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_stage_without_downsampling_and_hybrid_within_a_stage():
    model = tiny(
        layers=(1, 2, 3), dims=(8, 8, 16), downsamples=(False, True, True), mixers=["pool", "pool, identity", "pool"],
        positions=(None, (12, 8), None),
    )  # fmt: skip
    assert model.stage_ends == (0, 2, 4)
    assert model.stride == 8
    with torch.no_grad():
        shapes = [tuple(each.shape[1:]) for each in model.forward_stages(torch.randn(1, 3, 48, 32))]
    assert shapes == [(8, 12, 8), (8, 12, 8), (16, 6, 4)]
    assert "network.1.pos_embed" in model.state_dict()
    assert [type(block.token_mixer).__name__ for block in model.network[2]] == ["Pool", "Identity"]


def test_training_step_reaches_every_parameter_but_the_shift_that_cancels():
    model = tiny(drop_path=0.1).train()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None}
    assert not silent
    largest = max(p.grad.abs().max() for p in model.parameters())
    shifts = [p.grad.abs().max() for name, p in model.named_parameters() if name.endswith("norm1.bias")]
    assert len(shifts) == 5
    assert max(shifts) < 1e-4 * largest


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"pool_size": 4}}, "odd and positive"),
        ({"options": {"pool_size": 0}}, "odd and positive"),
        ({"dims": (8, 16)}, "dims must have one entry for each of 4 stages, got 2"),
        ({"mixers": ["pool"]}, "mixers must have one entry"),
        ({"mixers": "softmax_attention(head_dim=16)"}, "dim=8 is not divisible"),
        ({"mixers": "pooling"}, "unknown mixer 'pooling'; did you mean"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\)"),
        ({"drop_path": -0.1}, r"drop_path must lie in \[0, 1\)"),
        ({"layers": (1, 0, 2, 1)}, "at least one block"),
        ({"mixers": ["pool*2", "pool", "pool", "pool"]}, "names 2 mixers for 1"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 31, 64), (1, 3, 64, 8)])
def test_bad_images(shape):
    with pytest.raises((ValueError, TypeError), match=r"expected images|at least 32 pixels|[Tt]ype-check"):
        tiny()(torch.randn(shape))


@pytest.mark.parametrize(
    "settings",
    [
        {"mixers": ["pool", "pool", "pool", "spatial_fc(grid=(2, 2))"]},
        {"mixers": ["pool", "pool", "pool", "random_matrix(grid=(2, 2))"]},
        {"positions": (None, None, None, (2, 2))},
    ],
)
def test_other_resolutions_are_refused(settings):
    model = tiny(**settings)
    model(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"built for maps of \(2, 2\), got \(3, 2\)"):
        model(torch.randn(1, 3, 96, 64))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown PoolFormer 's13'; did you mean .*s12"):
        poolformer("s13")
    with pytest.raises(ValueError, match="has no head"):
        tiny(fork_feat=True).forward_head(torch.randn(1, 32, 2, 2))


@pytest.mark.compiled
def test_compiles_without_a_break():
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
