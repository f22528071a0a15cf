"""The poolings of the efficient-probing benchmark against their published order of operations, item by item."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cenote.ops.query_attention import attend
from cenote.pooling.base import QueryPooling
from cenote.pooling.registry import create_pooling, pooling_class
from cenote.probe.heads import Member, StackedReadout
from golden.cases import GOLDEN_DIR, read_case
from reference.attentive import REFERENCES, fill

# name, official arguments, token counts of the items of a batch
CASES = [
    ("efficient_probing", {"dim": 24, "num_queries": 3}, (5, 7, 1)),
    ("efficient_probing", {"dim": 24, "num_queries": 4, "d_out": 2, "qkv_bias": True}, (5, 7, 1)),
    ("simpool", {"dim": 15}, (5, 7, 1)),
    ("simpool", {"dim": 12, "num_heads": 3, "qkv_bias": True}, (5, 7, 1)),
    ("simpool", {"dim": 12, "num_heads": 2, "gamma": 1.5, "use_beta": True}, (5, 7, 1)),
    ("esimpool", {"dim": 24}, (5, 7, 1)),
    ("esimpool", {"dim": 15, "num_heads": 3, "gamma": 1.25}, (5, 7, 1)),
    ("esimpool", {"dim": 12, "num_heads": 1, "gamma": 2.0, "use_beta": True}, (5, 7, 1)),
    ("clip", {"in_features": 12, "feat_size": [2, 3]}, (6, 6, 6)),
    (
        "clip",
        {"in_features": 10, "feat_size": [1, 3], "embed_dim": 12, "out_features": 7, "qkv_bias": False},
        (3, 3, 3),
    ),
    ("siglip", {"in_features": 24}, (5, 7, 1)),
    ("siglip", {"in_features": 15, "num_heads": 5, "mlp_ratio": 1.5, "latent_len": 3, "pool_type": "avg"}, (5, 7, 1)),
    ("siglip", {"in_features": 15, "num_heads": 3, "latent_len": 2, "qkv_bias": False}, (5, 7, 1)),
    ("aim", {"dim": 32}, (5, 7, 1)),
    ("aim", {"dim": 15, "num_heads": 5, "num_queries": 3, "qkv_bias": True}, (5, 7, 1)),
    ("coca", {"dim": 14, "num_img_queries": 5}, (5, 7, 1)),
    ("coca", {"dim": 9, "dim_head": 5, "heads": 3, "num_img_queries": 2, "norm_context": True}, (5, 7, 1)),
    ("coca", {"dim": 9, "dim_head": 4, "heads": 1, "num_img_queries": 1, "parallel_ff": True, "ff_mult": 2}, (5, 7, 1)),
    ("cait", {"embed_dim": 12}, (5, 7, 1)),
    ("cait", {"embed_dim": 15, "num_heads": 3, "iterations": 3, "mlp_ratio_clstk": 2.0}, (5, 7, 1)),
    ("jepa", {"embed_dim": 32}, (5, 7, 1)),
    ("jepa", {"embed_dim": 15, "num_heads": 3, "depth": 3, "qkv_bias": False}, (5, 7, 1)),
    ("jepa", {"embed_dim": 12, "num_heads": 2, "depth": 2, "num_queries": 3, "mlp_ratio": 2.0}, (5, 7, 1)),
    ("cae", {"dim": 24}, (5, 7, 1)),
    ("cae", {"dim": 15, "num_heads": 5, "qkv_bias": True}, (5, 7, 1)),
    ("dinovit", {"d_model": 24}, (5, 7, 1)),
    ("dinovit", {"d_model": 15, "num_heads": 3}, (5, 7, 1)),
    ("abmilp", {"dim": 13}, (5, 7, 1)),
    ("abmilp", {"dim": 13, "self_attention_apply_to": "map", "activation": "relu", "depth": 3}, (5, 7, 1)),
    ("abmilp", {"dim": 13, "self_attention_apply_to": "none", "depth": 1, "content": "patch"}, (5, 7, 2)),
    ("abmilp", {"dim": 8, "cond": "pe", "num_patches": 4}, (5, 5, 5)),
    ("abmilp", {"dim": 8, "cond": "pe", "num_patches": 4, "content": "patch"}, (5, 5, 5)),
    ("cbam", {"channels": 32}, (9, 16, 1)),
    ("cbam", {"channels": 20, "spatial_kernel_size": 3, "rd_ratio": 0.25}, (9, 4, 16)),
    ("dolg", {"in_c": 13, "s3_dim": 13}, (9, 16, 1)),
    ("dolg", {"in_c": 13, "act_fn": "leakyrelu", "with_aspp": True}, (9, 64, 1)),
]
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]
# The options that make an item's vector independent of its batch mates; official goldens cover the published behaviour.
OWN_MINIMUM = {"batch_minimum": False}
NOT_INVARIANT = {"clip", "cbam"}


def built(name, config):
    reference = fill(REFERENCES[name](**config)).eval()
    extra = OWN_MINIMUM if "gamma" in config else {}
    return reference, pooling_class(name).from_reference(reference.state_dict(), **config, **extra).eval()


def width(config):
    return next(
        config[key] for key in ("dim", "in_features", "embed_dim", "d_model", "channels", "in_c") if key in config
    )


def padded(config, counts, left=0, right=0, seed=1):
    """A batch of items of these token counts, padded with large values, and its mask; item i is shifted by i more."""
    generator = torch.Generator().manual_seed(seed)
    total = max(counts) + left + right + len(counts)
    x = torch.full((len(counts), total, width(config)), 1e4)
    mask = torch.zeros(len(counts), total, dtype=torch.bool)
    for i, n in enumerate(counts):
        x[i, left + i : left + i + n] = torch.randn(n, width(config), generator=generator)
        mask[i, left + i : left + i + n] = True
    return x, mask


def one_by_one(reference, x, mask):
    return torch.cat([reference(x[i : i + 1, mask[i]])[0] for i in range(len(x))])


@pytest.mark.parametrize(("name", "config", "counts"), CASES, ids=IDS)
def test_equals_the_published_order_on_unpadded_items(name, config, counts):
    reference, pool = built(name, config)
    x, mask = padded(config, counts, left=2, right=3)
    torch.testing.assert_close(pool(x, mask), one_by_one(reference, x, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "config", "counts"), CASES, ids=IDS)
def test_gradients_equal_those_of_the_published_order(name, config, counts):
    reference, pool = built(name, config)
    x, mask = padded(config, counts)
    x, x2 = x.double().requires_grad_(), x.double().requires_grad_()
    reference, pool = reference.double(), pool.double()
    out = one_by_one(reference, x, mask)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    (out * upstream).sum().backward()
    (pool(x2, mask) * upstream).sum().backward()
    torch.testing.assert_close(x2.grad, x.grad)
    # Translating names and splitting fused weights is linear, so the same translation carries the gradients over.
    parameters = dict(reference.named_parameters())
    grads = {
        key: torch.zeros_like(value) if key not in parameters or parameters[key].grad is None else parameters[key].grad
        for key, value in reference.state_dict().items()
    }
    expected = pooling_class(name).from_reference(grads, **config).double().state_dict()
    for key, parameter in pool.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # from_reference builds in float32, so the carried gradients are rounded to it.
        torch.testing.assert_close(grad, expected[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("name", "config", "counts"), CASES, ids=IDS)
def test_padding_never_matters(name, config, counts):
    _, pool = built(name, config)
    x, mask = padded(config, counts)
    alone = torch.cat([pool(x[i : i + 1, mask[i]]) for i in range(len(x))])
    # Efficient probing reads tokens as they are, so its padding must be finite.
    worst = (1e4, 1e4) if name == "efficient_probing" else (float("nan"), float("inf"))
    for left, right, value in ((0, 0, 1e4), (4, 0, worst[0]), (0, 9, worst[1])):
        y, its = padded(config, counts, left, right)
        y = y.masked_fill(~its[..., None], value)
        torch.testing.assert_close(pool(y, its), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "config", "counts"), CASES, ids=IDS)
def test_permutation_invariance_is_as_declared(name, config, counts):
    _, pool = built(name, config)
    n = max(counts)
    x = torch.randn(2, n, width(config), generator=torch.Generator().manual_seed(5))
    moved = pool(x[:, torch.randperm(n, generator=torch.Generator().manual_seed(6))])
    same = torch.allclose(moved, pool(x), rtol=1e-4, atol=1e-5)
    assert same == pool.permutation_invariant
    if name in NOT_INVARIANT:
        assert not pool.permutation_invariant


@pytest.mark.parametrize(("name", "config", "counts"), CASES, ids=IDS)
def test_weights_are_those_of_the_published_order(name, config, counts):
    reference, pool = built(name, config)
    if not pool.attends:
        pytest.skip("does not attend")
    n = max(counts)
    x = torch.randn(3, n, width(config), generator=torch.Generator().manual_seed(5))
    _, weights = pool(x, return_weights=True)
    _, expected = reference(x)
    if expected.ndim == 4 and name != "dolg":  # (batch, heads, queries, tokens): heads innermost
        expected = expected.transpose(1, 2).flatten(1, 2)
    elif name == "abmilp":
        expected = expected.mT
        weights = weights[..., n - expected.shape[-1] :]
    torch.testing.assert_close(weights, expected.flatten(2) if name == "dolg" else expected, rtol=1e-4, atol=1e-5)
    x, mask = padded(config, counts, left=1)
    _, weights = pool(x, mask, return_weights=True)
    assert weights.masked_select(~mask[:, None]).abs().max() == 0


CALLER_QUERIES = ("efficient_probing", "simpool", "esimpool", "clip", "aim", "coca", "cait", "jepa")


@pytest.mark.parametrize(("name", "config", "counts"), [c for c in CASES if c[0] in CALLER_QUERIES])
def test_query_tokens_take_the_place_of_the_own_query(name, config, counts):
    reference, pool = built(name, config)
    x = torch.randn(3, max(counts), width(config), generator=torch.Generator().manual_seed(5))
    own = 1 if name == "coca" else config.get("num_queries", 1)
    cls = torch.randn(3, own, width(config), generator=torch.Generator().manual_seed(6))
    expected = torch.cat([reference(x[i : i + 1], cls=cls[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(pool(x, query_tokens=cls), expected, rtol=1e-4, atol=1e-5)


SHARED = [(n, c, k) for n, c, k in CASES if issubclass(pooling_class(n), QueryPooling)]


@pytest.mark.parametrize(("name", "config", "counts"), SHARED)
def test_models_read_together_as_they_do_apart(name, config, counts):
    seeds = iter(range(3))
    poolings = []

    def make():
        seed = next(seeds)
        reference = fill(REFERENCES[name](**config), seed)
        if name == "aim":  # running statistics belong to the tokens, not to the model
            reference.bn.load_state_dict(nn.BatchNorm1d(width(config), affine=False).state_dict())
        extra = OWN_MINIMUM if "gamma" in config else {}
        poolings.append(pooling_class(name).from_reference(reference.state_dict(), **config, **extra))
        return poolings[-1]

    stack = StackedReadout(make, [Member(0.1, 1.0, 0)] * 3, 2).eval()
    x, mask = padded(config, counts)
    vectors, weights = stack.pool(x, mask)
    for vector, pooling in zip(vectors, poolings, strict=True):
        torch.testing.assert_close(vector, pooling.eval()(x, mask), rtol=1e-4, atol=1e-5)
    assert (weights is not None) == poolings[0].single_read


@pytest.mark.parametrize("name", ["abmilp", "cbam", "dinovit", "dolg"])
def test_models_that_cannot_share_a_read_train_side_by_side(name):
    seeds, poolings = iter(range(2)), []

    def make():
        torch.manual_seed(next(seeds))
        poolings.append(create_pooling(name, dim=16))
        return poolings[-1]

    stack = StackedReadout(make, [Member(0.1, 1.0, seed) for seed in range(2)], 2).train()
    x, mask = padded({"dim": 16}, (9, 16, 4))
    vectors, _ = stack.pool(x, mask)
    for index, pooling in enumerate(poolings):
        torch.testing.assert_close(vectors[index], pooling.train()(x, mask), rtol=1e-4, atol=1e-5)
        for key, buffer in pooling.named_buffers():
            torch.testing.assert_close(stack.stats[f"pooling.{key}"][index], buffer)


def test_single_read_says_which_configurations_share_the_tokens():
    several = {"cait": {"iterations": 2}, "simpool": {"gamma": 2.0}}
    for name in sorted({name for name, _, _ in SHARED}):
        grid = {"grid": (2, 2)} if name == "clip" else {}
        assert create_pooling(name, dim=96, **grid).single_read
        if name in several:
            assert not create_pooling(name, dim=96, **several[name]).single_read
    assert create_pooling("jepa", dim=32, depth=3).single_read


@pytest.mark.parametrize("name", sorted({name for name, _, _ in SHARED}))
def test_prepare_touches_no_parameter(name):
    pool = create_pooling(name, dim=96, grid=(2, 2))
    prepared = pool.prepare(torch.randn(2, 4, 96), None)
    assert not any(part.requires_grad for part in prepared if isinstance(part, torch.Tensor))
    read = attend(*pool.query(prepared)[:1], prepared.keys, prepared.values)
    assert read.pooled.requires_grad


def test_one_zero_query_of_efficient_probing_is_linear_of_the_mean():
    pool = create_pooling("efficient_probing", dim=12, num_queries=1, qkv_bias=True)
    nn.init.zeros_(pool.queries)
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(pool(x), pool.value(x.mean(1)))


def test_folded_efficient_probing_equals_the_naive_layer_at_full_size():
    reference = fill(REFERENCES["efficient_probing"](384, 32, qkv_bias=True))
    pool = pooling_class("efficient_probing").from_reference(reference.state_dict(), qkv_bias=True)
    x, mask = padded({"dim": 384}, (50, 64, 33))
    upstream = torch.randn(3, 384, generator=torch.Generator().manual_seed(2))
    expected, out = one_by_one(reference, x, mask), pool(x, mask)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad((out * upstream).sum(), [pool.queries, pool.value.weight, pool.value.bias])
    plain = torch.autograd.grad(
        (expected * upstream).sum(), [reference.cls_token, reference.v.weight, reference.v.bias]
    )  # fmt: skip
    for grad, naive in zip(grads, plain, strict=True):
        torch.testing.assert_close(grad, naive.reshape(grad.shape), rtol=1e-5, atol=1e-5)


def test_published_minimum_of_simpool_is_over_the_batch():
    for name in ("simpool", "esimpool"):
        config = {"dim": 12, "num_heads": 2, "gamma": 1.5}
        reference = fill(REFERENCES[name](**config))
        pool = pooling_class(name).from_reference(reference.state_dict(), **config)
        x = torch.randn(3, 5, 12) * torch.tensor([1.0, 2.0, 5.0])[:, None, None]
        torch.testing.assert_close(pool(x), reference(x)[0], rtol=1e-4, atol=1e-5)
        corrected = pooling_class(name).from_reference(reference.state_dict(), **config, **OWN_MINIMUM)
        assert not torch.allclose(pool(x), corrected(x), atol=1e-3)


def test_aim_in_training_normalises_and_tracks_as_batch_norm_does():
    reference = fill(REFERENCES["aim"](12, 3)).train()
    pool = pooling_class("aim").from_reference(reference.state_dict(), num_heads=3).train()
    x = torch.randn(4, 5, 12) + 2
    wide = torch.cat([torch.full((4, 3, 12), 1e4), x], 1)
    mask = torch.arange(8).expand(4, -1) >= 3
    torch.testing.assert_close(pool(wide, mask), reference(x)[0], rtol=1e-4, atol=1e-5)
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(pool.batch_norm, buffer), getattr(reference.bn, buffer), check_dtype=False)


@pytest.mark.parametrize("name", ["cbam", "dolg"])
def test_convolutional_poolings_in_training_keep_padding_out_of_batch_norm(name):
    config = {"cbam": {"channels": 16}, "dolg": {"in_c": 16}}[name]
    reference = fill(REFERENCES[name](**config)).train()
    pool = pooling_class(name).from_reference(reference.state_dict(), **config).train()
    x = torch.randn(3, 9, 16)
    wide, mask = torch.full((3, 15, 16), 1e4), torch.zeros(3, 15, dtype=torch.bool)
    for i in range(3):
        wide[i, i : i + 9], mask[i, i : i + 9] = x[i], True
    torch.testing.assert_close(pool(wide, mask), reference(x)[0], rtol=1e-4, atol=1e-5)
    theirs = reference.bn if name == "dolg" else reference.spatial["conv"]["bn"]
    torch.testing.assert_close(pool.batch_norm.running_var, theirs.running_var)


@pytest.mark.parametrize("name", ["cbam", "dolg"])
def test_oblong_grids(name):
    config = {"cbam": {"channels": 16}, "dolg": {"in_c": 16, "with_aspp": True}}[name]
    reference = fill(REFERENCES[name](**config)).eval()
    pool = pooling_class(name).from_reference(reference.state_dict(), **config, grid=(2, 5)).eval()
    x = torch.randn(2, 10, 16)
    torch.testing.assert_close(pool(x), reference(x, grid=(2, 5))[0], rtol=1e-4, atol=1e-5)
    # A hole at the rim is as if the map ended there.
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, [4, 9]] = False
    torch.testing.assert_close(pool(x, mask), reference(x[:, mask[0]], grid=(2, 4))[0], rtol=1e-4, atol=1e-5)


def test_clip_leaves_masked_cells_empty():
    reference, pool = built("clip", {"in_features": 12, "feat_size": [2, 3]})
    x, keep = torch.randn(2, 6, 12), [0, 2, 3, 5]
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, keep] = True
    reference.pos_embed = nn.Parameter(reference.pos_embed[[0, *(k + 1 for k in keep)]])
    torch.testing.assert_close(pool(x, mask), reference(x[:, keep])[0], rtol=1e-4, atol=1e-5)


def test_abmilp_embedding_is_that_of_a_grid_behind_prefix_tokens():
    pool = create_pooling("abmilp", dim=8, cond="pe", grid=(2, 3))
    assert pool.places[0].abs().max() == 0
    row, column, rates = 1, 2, torch.tensor([1.0, 10000**-0.5])
    expected = torch.cat([f(p * rates) for p in (column, row) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(pool.places[1 + row * 3 + column], expected)
    x = torch.randn(1, 6, 8)
    registers = torch.cat([torch.full((1, 2, 8), 1e4), x], 1)
    mask = torch.arange(8)[None] >= 2
    torch.testing.assert_close(pool(registers, mask), pool(x))


# The table of the benchmark: parameters as a function of the width, MMACs at width 768 and 196 tokens with its digits.
TABLE = {
    "abmilp": (lambda d: 5 * d * d + 3 * d + 1, "637"),
    "simpool": (lambda d: 2 * d * d + 2 * d, "117"),
    "esimpool": (lambda d: 2 * d, "0.3"),
    "clip": (lambda d: 4 * d * d + (196 + 7) * d, "524"),
    "siglip": (lambda d: 12 * d * d + 10 * d, "237"),
    "aim": (lambda d: 2 * d * d + d, "231"),
    "cbam": (lambda d: d * d // 8 + 100, "0.2"),
    "coca": (lambda d: 1349 * d, "213"),
    "cait": (lambda d: 12 * d * d + 18 * d, "239"),
    "dinovit": (lambda d: 12 * d * d + 10 * d, "1446"),
    "jepa": (lambda d: 12 * d * d + 14 * d, "237"),
    "dolg": (lambda d: d * d + 4 * d + 1, "116"),
    "cae": (lambda d: 4 * d * d + 10 * d, "233"),
    "efficient_probing": (lambda d: 32 * d + d * d, "121"),
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("dim", [96, 384, 768])
def test_parameter_counts_of_the_table(name, dim):
    with torch.device("meta"):
        pool = create_pooling(name, dim=dim, grid=(14, 14))
    assert sum(p.numel() for p in pool.parameters()) == TABLE[name][0](dim)


def official(name, dim):
    """The published layer as the official runner builds it, on the meta device."""
    with torch.device("meta"):
        return REFERENCES[name](dim, **{"clip": {"feat_size": (14, 14)}}.get(name, {}))


@pytest.mark.parametrize("name", TABLE)
def test_macs_of_the_table(name):
    with FlopCounterMode(display=False) as counter:
        official(name, 768)(torch.empty(1, 196, 768, device="meta"))
    digits = TABLE[name][1]
    unit = 10.0 ** -len(digits.partition(".")[2])
    # aim's figure is printed rounded down (231.5), the others to the nearest.
    assert abs(counter.get_total_flops() / 2e6 - float(digits)) < (0.52 if name != "aim" else 1.0) * unit


# Official keys and shapes at width 768, as the official runner builds the layers.
D, H = 768, 3072


def both(prefix, *shape):
    return {f"{prefix}.weight": shape, f"{prefix}.bias": shape[:1]}


def gains(*prefixes):
    return {key: shape for prefix in prefixes for key, shape in both(prefix, D).items()}


def mlp_keys(prefix):
    return both(f"{prefix}.fc1", H, D) | both(f"{prefix}.fc2", D, H)


def statistics(prefix, width):
    return {
        f"{prefix}.running_mean": (width,),
        f"{prefix}.running_var": (width,),
        f"{prefix}.num_batches_tracked": (),
    }


CA, XB = "blocks_token_only.0", "cross_attention_block"
KEYS = {
    "efficient_probing": {"cls_token": (1, 32, D), "v.weight": (D, D)},
    "abmilp": {"self_attn.qkv.weight": (3 * D, D)}
    | both("self_attn.proj", D, D)
    | both("attention_predictor.0", D, D)
    | both("attention_predictor.2", 1, D),
    "simpool": {"wq.weight": (D, D), "wk.weight": (D, D)} | gains("norm_patches"),
    "esimpool": gains("norm_patches"),
    "clip": {"pos_embed": (197, D)} | gains("norm") | both("qkv", 3 * D, D) | both("proj", D, D),
    "siglip": {"latent": (1, 1, D)} | both("q", D, D) | both("kv", 2 * D, D) | both("proj", D, D) | mlp_keys("mlp"),
    "aim": {"cls_token": (1, 1, D), "k.weight": (D, D), "v.weight": (D, D)} | statistics("bn", D),
    "cbam": {"channel.fc1.weight": (48, D, 1, 1), "channel.fc2.weight": (D, 48, 1, 1)}
    | {"spatial.conv.conv.weight": (1, 2, 7, 7)}
    | both("spatial.conv.bn", 1)
    | statistics("spatial.conv.bn", 1),
    "coca": {"img_queries": (196, D), "norm.gamma": (D,), "norm.beta": (D,)}
    | {"to_q.weight": (512, D), "to_kv.weight": (128, D), "to_out.weight": (D, 512)},
    "cait": {"cls_token": (1, 1, D), f"{CA}.gamma_1": (D,), f"{CA}.gamma_2": (D,)}
    | gains("norm", f"{CA}.norm1", f"{CA}.norm2")
    | {key: shape for name in ("q", "k", "v", "proj") for key, shape in both(f"{CA}.attn.{name}", D, D).items()}
    | mlp_keys(f"{CA}.mlp"),
    "dinovit": {"dino_block.attn.qkv.weight": (3 * D, D)}
    | gains("dino_block.norm1", "dino_block.norm2")
    | both("dino_block.attn.proj", D, D)
    | mlp_keys("dino_block.mlp"),
    "jepa": {"query_tokens": (1, 1, D)}
    | gains(f"{XB}.norm1", f"{XB}.norm2")
    | both(f"{XB}.xattn.q", D, D)
    | both(f"{XB}.xattn.kv", 2 * D, D)
    | both(f"{XB}.xattn.proj", D, D)
    | mlp_keys(f"{XB}.mlp"),
    "dolg": both("conv1", D, D, 1, 1) | both("conv2", 1, D, 1, 1) | gains("bn") | statistics("bn", D),
    "cae": {"query_token": (1, 1, D)}
    | gains("norm1_q", "norm1_k", "norm1_v", "norm2_cross")
    | {f"cross_attn.{name}.weight": (D, D) for name in "qkv"}
    | both("cross_attn.proj", D, D),
}


@pytest.mark.parametrize("name", KEYS)
def test_takes_official_keys_at_the_published_size(name):
    state = {key: torch.empty(shape, device="meta") for key, shape in KEYS[name].items()}
    with torch.device("meta"):
        options = {"self_attention_apply_to": "both"} if name == "abmilp" else {}
        pool = pooling_class(name).from_reference(state, **options)
        assert sum(p.numel() for p in pool.parameters()) == TABLE[name][0](768)
        with pytest.raises((ValueError, KeyError, RuntimeError)):
            pooling_class(name).from_reference({k: v for k, v in state.items() if k != next(iter(state))}, **options)
        if name != "efficient_probing":
            with pytest.raises(ValueError, match="unknown key 'other'"):
                pooling_class(name).from_reference({**state, "other": torch.empty(1)}, **options)
    assert {k: tuple(v.shape) for k, v in official(name, 768).state_dict().items()} == KEYS[name]


def test_reference_forms_have_the_keys_of_the_golden_files():
    counter = {"num_batches_tracked", "norm.beta"}
    for path in GOLDEN_DIR.glob("efficient-probing-*.safetensors"):
        case = read_case(path)
        if case.case in REFERENCES and case.case in KEYS:
            config = {k: v for k, v in case.config.items() if k not in ("init_scale",)}
            if case.case == "esimpool":
                config.pop("qkv_bias", None)
            keys = set(REFERENCES[case.case](**config).state_dict())
            assert {k for k in keys if k.split(".")[-1] not in counter} == {
                k for k in case.state if k.split(".")[-1] not in counter
            }, case.case


@pytest.mark.parametrize(
    "name", [name for name in TABLE if name not in ("abmilp", "cbam", "coca", "dolg", "efficient_probing")]
)
def test_heads_that_do_not_divide_are_refused_with_those_that_would(name):
    with pytest.raises(ValueError, match="num_heads must divide"):
        create_pooling(name, dim=20, num_heads=3, grid=(2, 2))
    with pytest.raises(ValueError, match="num_heads must divide"):
        create_pooling(name, dim=20, num_heads=0, grid=(2, 2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("efficient_probing(num_queries=5)", "num_queries must divide"),
        ("efficient_probing(d_out=5)", "d_out must divide"),
        ("efficient_probing(num_queries=0)", "at least 1"),
        ("simpool(gamma=0.0)", "gamma must be positive"),
        ("esimpool(num_heads=4, gamma=-1.0)", "gamma must be positive"),
        ("siglip(latent_len=0)", "at least 1"),
        ("siglip(pool_type='max')", "pool_type"),
        ("aim(num_queries=0)", "at least 1"),
        ("coca(heads=0)", "at least 1"),
        ("cait(iterations=0)", "iterations"),
        ("jepa(depth=0)", "depth"),
        ("cbam(spatial_kernel_size=4)", "odd"),
        ("dolg(act_fn='gelu')", "act_fn"),
        ("abmilp(activation='gelu')", "activation"),
        ("abmilp(cond='pe')", "grid"),
        ("abmilp(depth=0)", "depth"),
    ],
)
def test_bad_options_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        create_pooling(spec, dim=32)


@pytest.mark.parametrize("name", ["cbam", "dolg"])
def test_tokens_that_do_not_fill_a_grid_are_refused(name):
    pool = create_pooling(name, dim=8)
    with pytest.raises(ValueError, match="must be a square"):
        pool(torch.randn(2, 10, 8))
    mask = torch.arange(10) < torch.tensor([[9], [5]])
    with pytest.raises(ValueError, match=r"form a square.*row\(s\) \[1\] have \[5\]"):
        pool(torch.randn(2, 10, 8), mask)
    with pytest.raises(ValueError, match="a grid of 3 x 3 needs 9 tokens, got 10"):
        create_pooling(name, dim=8, grid=(3, 3))(torch.randn(2, 10, 8))


def test_clip_refuses_another_token_count():
    pool = create_pooling("clip", dim=8, grid=(3, 3))
    for count in (8, 10):
        with pytest.raises(ValueError, match="a grid of 3 x 3 needs 9 tokens"):
            pool(torch.randn(2, count, 8))
    with pytest.raises(ValueError, match="fill a grid of 3 x 3"):
        pool(torch.randn(1, 10, 8), torch.arange(10)[None] < 8)


def test_abmilp_refuses_an_item_of_which_nothing_is_left():
    pool = create_pooling("abmilp", dim=8, content="patch")
    with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
        pool(torch.randn(2, 3, 8), torch.tensor([[True, True, False], [False, True, False]]))
    with pytest.raises(ValueError, match="embedding of 4 patches"):
        create_pooling("abmilp", dim=8, cond="pe", grid=(2, 2))(torch.randn(2, 3, 8))


def test_query_tokens_of_another_shape_are_refused():
    pool = create_pooling("jepa", dim=16)
    with pytest.raises(ValueError, match="width 16"):
        pool(torch.randn(2, 3, 16), query_tokens=torch.randn(2, 1, 8))
    with pytest.raises(ValueError, match=r"1 query token\(s\), got 2"):
        pool(torch.randn(2, 3, 16), query_tokens=torch.randn(2, 2, 16))


def test_coca_refuses_a_shift_that_the_layer_cannot_have():
    state = dict(REFERENCES["coca"](12).state_dict())
    state["norm.beta"] = torch.ones(12)
    with pytest.raises(ValueError, match="constant zero"):
        pooling_class("coca").from_reference(state)


def test_dolg_refuses_a_width_that_the_official_layer_scrambles():
    state = {"conv1.weight": torch.zeros(6, 4, 1, 1)}
    with pytest.raises(ValueError, match="s3_dim"):
        pooling_class("dolg").from_reference(state, in_c=4, s3_dim=6)
