"""L-TDNN: against the plain form, padding, training, published sizes and options."""

import math

import jaxtyping
import pytest
import torch
from torch import nn

from cenote.pooling import create_pooling
from cenote.pooling.l_tdnn import LTDNN
from cenote.probe.heads import Member, StackedReadout
from reference.l_tdnn import l_tdnn

SMALL = {
    "conv_dim": 12,
    "hidden_size": 12,
    "num_heads": 3,
    "pool_dim": 5,
    "se_channels": 7,
    "res2_scale": 4,
    "depth": 3,
}


def build(layers=4, dim=6, seed=0, **options):
    """A small pooling in eval mode, no parameter at a special value, with running statistics of some data."""
    torch.manual_seed(seed)
    pool = LTDNN(dim, layers, **{**SMALL, **options})
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(3):
            pool.train()(torch.randn(6, layers, 9, dim))
    return pool.eval()


def ragged(layers=4, dim=6, lengths=(9, 4, 1), left=0, width=9, garbage=float("nan")):
    """Clips ``lengths`` frames long behind ``left`` frames of garbage, and their mask."""
    generator = torch.Generator().manual_seed(1)
    x = torch.full((len(lengths), layers, left + width, dim), garbage)
    mask = torch.zeros(len(lengths), left + width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        x[row, :, left : left + n] = torch.randn(layers, n, dim, generator=generator)
        mask[row, left : left + n] = True
    return x, mask


def close(a, b, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("net", "layers", "options"),
    [
        ("ecapa", 4, {}),
        ("ecapa", 2, {"num_heads": 1}),
        ("ecapa", 5, {"res2_scale": 1, "num_blocks": 1}),
        ("ecapa", 3, {"res2_scale": 2, "num_blocks": 4}),
        ("d3net", 4, {}),
        ("d3net", 2, {"depth": 1, "num_heads": 4}),
        ("d3net", 7, {"depth": 4, "num_blocks": 1}),
    ],
)
def test_a_padded_batch_equals_the_plain_form_clip_by_clip(net, layers, options):
    pool = build(layers, net=net, **options)
    sizes = {key: {**SMALL, **options}[key] for key in ("res2_scale", "depth")}
    for left, garbage in ((0, float("nan")), (3, 1e4)):
        x, mask = ragged(layers, left=left, garbage=garbage)
        with torch.no_grad():
            got = pool(x, mask)
            for row, real, vector in zip(x, mask, got, strict=True):
                close(vector, l_tdnn(pool.state_dict(), row[:, real], net, pool.layer_pool.num_heads, **sizes))


@pytest.mark.parametrize("net", ["ecapa", "d3net"])
def test_training_statistics_are_those_of_the_real_frames(net):
    """Nothing changes with the amount of padding; without any, the masked path is the unmasked one."""
    results = []
    for left, width, garbage in ((0, 9, 0.0), (4, 15, float("nan"))):
        pool = build(net=net, dropout=0.0).double().train()
        x, mask = ragged(lengths=(9, 4, 7), left=left, width=width, garbage=garbage)
        results.append((pool(x.double(), mask), dict(pool.named_buffers())))
    close(results[1][0], results[0][0])
    close(results[1][1], results[0][1])
    results = []
    for mask in (None, torch.ones(3, 9, dtype=torch.bool)):
        pool = build(net=net, dropout=0.0).double().train()
        vector = pool(ragged(lengths=(9, 9, 9))[0].double(), mask)
        vector.square().sum().backward()
        results.append((vector, dict(pool.named_buffers()), [p.grad for p in pool.parameters()]))
    close(results[1], results[0])
    moved = [(pool.net.in_norm.running_mean - build(net=net, dropout=0.0).net.in_norm.running_mean).abs().max()]
    assert min(moved) > 1e-3


def test_gradients_are_finite_for_equal_frames_and_for_one():
    pool = build(dropout=0.0).train()
    x = torch.zeros(3, 4, 6, 6, requires_grad=True)
    for mask in (None, torch.arange(6) < torch.tensor([1, 6, 2])[:, None]):
        pool.zero_grad()
        pool(x, mask).square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in [*pool.parameters(), x])


@pytest.mark.parametrize("net", ["ecapa", "d3net"])
def test_two_members_train_side_by_side_with_a_mask(net):
    """As a stack in the probe: vectors, gradients and running statistics of two seeds, in float64."""
    stack = StackedReadout(
        lambda: LTDNN(6, 4, net=net, dropout=0.0, **SMALL), [Member(0.1, 1.0, 0), Member(0.1, 1.0, 1)], 3
    )
    stack.params = {name: p.detach().double().requires_grad_() for name, p in stack.params.items()}
    stack.stats = {name: s.double() for name, s in stack.stats.items()}
    stack.template.double()
    alone = [stack.member(stack.state(), k)[0].double().train() for k in range(2)]
    x, mask = ragged(lengths=(9, 4, 7, 2))
    x = x.double()
    stack.train()
    vectors, _ = stack.pool(x, mask)
    upstream = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (vectors * upstream).sum().backward()
    for k, pool in enumerate(alone):
        expected = pool(x, mask)
        close(vectors[k], expected)
        (expected * upstream).sum().backward()
        state = stack.state()
        for name, parameter in pool.named_parameters():
            close(stack.params[f"pooling.{name}"].grad[k], parameter.grad, atol=1e-4)
        for name, buffer in pool.named_buffers():
            close(state[f"pooling.{name}"][k], buffer)
    assert not torch.allclose(vectors[0], vectors[1])


@pytest.mark.parametrize("attention_dropout", ["frames", "weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_members_train_under_autocast_each_with_its_own_dropout(attention_dropout, dtype):
    options = {**SMALL, "dropout": 0.3, "attention_dropout": attention_dropout}
    stack = StackedReadout(lambda: LTDNN(6, 4, **options), [Member(0.1, 1.0, 0)] * 2, 3).train()
    x, mask = ragged()
    with torch.autocast("cpu", dtype=dtype):
        outputs = stack(x, mask)
        outputs.float().square().sum().backward()
    assert bool(outputs.isfinite().all())
    assert not torch.equal(outputs[0], outputs[1])  # one seed, two draws
    assert all(bool(p.grad.isfinite().all()) for p in stack.params.values())


@pytest.mark.parametrize(
    ("net", "dim", "layers", "millions"),
    [("ecapa", 768, 13, 5.72), ("ecapa", 1024, 25, 6.70), ("d3net", 768, 13, 6.48), ("d3net", 1024, 25, 6.81)],
)
def test_published_sizes_and_key_names(net, dim, layers, millions):
    official = official_shapes(net, dim, layers)
    state = {name: torch.empty(shape, device="meta") for name, shape in official.items()}
    state |= {"aam_softmax.weight": torch.empty(1, 192, 1211, device="meta"), "backbone.x": torch.empty(1)}
    config = {"net": net, "in_channels": dim, "n_layers": layers, "conv_dim": 256, "hidden_size": 512, "n_head": 8}
    pool = LTDNN.from_reference(state, **config, pool_dim=192, num_loss_heads=1, num_classes=1211)
    assert sum(p.numel() for p in pool.parameters()) / 1e6 == pytest.approx(millions, abs=0.0051)
    with torch.device("meta"):
        ours = LTDNN(dim, layers, net=net)
    assert {k: v.shape for k, v in pool.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert (pool.masked, pool.deviation, pool.attention_dropout) == ("statistics", "official", "weights")
    assert (ours.masked, ours.deviation, ours.attention_dropout) == ("all", "biased", "frames")


def official_shapes(net, dim, layers, c=256, size=512, heads=8, out=192, se=128):
    """The encoder's keys as the official code names them."""
    shapes = {}

    def norm(name, width):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"encoder.{name}.{part}"] = (width,)
        shapes[f"encoder.{name}.num_batches_tracked"] = ()

    def layer(name, *shape, bias=True):
        shapes[f"encoder.{name}.weight"] = shape
        if bias:
            shapes[f"encoder.{name}.bias"] = shape[:1]

    def crb(name, i, o, *kernel):
        layer(f"{name}.conv", o, i, *kernel)
        norm(f"{name}.bn", o)

    norm("net.in_conv.0", dim)
    crb("net.in_conv.1", dim, c, *((5, 3) if net == "ecapa" else (1, 5)))
    for b in range(3):
        if net == "ecapa":
            block = f"net.block{b + 1}.se_res2block"
            crb(f"{block}.0", c, c, 1, 1)
            for i in range(7):
                crb(f"{block}.1.convs.{i}", c // 8, c // 8, 3, 3)
            crb(f"{block}.2", c, c, 1, 1)
            attention = f"{block}.3.se_attention"
        else:
            for d in range(4):
                crb(f"net.se_d2blocks.{b}.layers.{d}", c * (4 - d) // 4, c * (4 - d) // 4, 3, 3)
            attention = f"net.se_d2blocks.{b}.se.se_attention"
        layer(f"{attention}.1", se, c, 1, 1)
        layer(f"{attention}.3", c, se, 1, 1)
    layer("net.fusion.0", 3 * c, 3 * c, 1, 1)
    norm("l_pool.in_projection.0", 3 * c)
    layer("l_pool.in_projection.1", size, 3 * c, 1, 1, bias=False)
    half = layers // 2
    for name, shape in {"W1": (layers, half), "b1": (1, half), "W2": (half, layers), "b2": (1, layers)}.items():
        shapes[f"encoder.l_pool.{name}"] = (heads, *shape)
    layer("l_pool.out_projection.0", size, size, 1, bias=False)
    norm("l_pool.out_projection.1", size)
    layer("t_pool.attention.0", size // 2, 3 * size, 1)
    norm("t_pool.attention.2", size // 2)
    layer("t_pool.attention.3", size, size // 2, 1)
    norm("t_pool.attn_norm", 2 * size)
    layer("t_pool.out_proj", out, 2 * size)
    norm("t_pool.out_norm", out)
    return shapes


def official_state(net):
    shapes = official_shapes(net, 6, 4, c=16, size=12, heads=3, out=5, se=7)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * torch.Size(shape[1:]).numel() ** -0.5
        if len(shape) > 1
        else torch.rand(shape, generator=generator) + 0.5
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("net", ["ecapa", "d3net"])
def test_published_behaviour_masks_only_the_statistics(net):
    x, mask = ragged(garbage=5.0)
    published = LTDNN.from_reference(official_state(net)).eval()
    corrected = LTDNN.from_reference(official_state(net), masked="all", deviation="biased").eval()
    assert not torch.allclose(published(x, mask)[1], published(x[1:2, :, :4], mask[1:2, :4])[0], atol=1e-3)
    close(corrected(x, mask)[1], corrected(x[1:2, :, :4])[0])
    # With equal amounts of padding and zeros there, the frames' outputs still differ: norms make padding nonzero.
    assert not torch.allclose(published(x, mask)[1], corrected(x, mask)[1], atol=1e-3)
    own = {"net": net, "heads": 3, "res2_scale": 8, "depth": 4}
    for official, correction in ((published, 1), (corrected, 0)):
        vector = l_tdnn(official.state_dict(), x[0], deviation=correction, **own)
        close(official(x[:1])[0], vector)


def test_the_callers_weights_stay_as_they_are():
    state = official_state("ecapa")
    before = {name: tensor.clone() for name, tensor in state.items()}
    pool = LTDNN.from_reference(state).train()
    pool(torch.randn(3, 4, 5, 6)).sum().backward()
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.zero_()
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_settings_of_the_other_network_are_passed_over():
    LTDNN.from_reference(official_state("ecapa"), net="ecapa", n_blocks=5, depth=7)
    LTDNN.from_reference(official_state("d3net"), net="d3net", res2_scale=5)
    with pytest.raises(ValueError, match="n_blocks=5 contradicts the weights"):
        LTDNN.from_reference(official_state("d3net"), n_blocks=5)


def test_checkpoints_that_do_not_fit_are_refused():
    state = official_state("ecapa")
    with pytest.raises(ValueError, match=r"n_layers=13 contradicts the weights, which have 4"):
        LTDNN.from_reference(state, n_layers=13)
    with pytest.raises(ValueError, match="net='d3net' contradicts"):
        LTDNN.from_reference(state, net="d3net")
    with pytest.raises(ValueError, match="not a checkpoint of L-TDNN"):
        LTDNN.from_reference({})
    missing = {name: t for name, t in state.items() if name != "encoder.t_pool.out_norm.bias"}
    with pytest.raises(ValueError, match=r"do not fit together(.|\n)*out_norm\.bias"):
        LTDNN.from_reference(missing)
    with pytest.raises(ValueError, match="do not fit together"):
        LTDNN.from_reference({**state, "encoder.l_pool.W2": torch.zeros(3, 2, 5)})


def test_attention_dropout_leaves_frames_out_before_the_softmax_or_weights_after_it():
    y = torch.randn(64, 10, 12, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(10) < torch.randint(1, 11, (64, 1), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    _, frames = build(dropout=0.5).train().pool_frames(y, mask)
    close(frames.sum(dim=2), torch.ones(64, 1))
    real = mask.sum().item()
    assert ((frames > 0).sum().item() / real) == pytest.approx(0.5, abs=0.1)
    assert bool((frames[:, 0][~mask] == 0).all())
    _, weights = build(dropout=0.5, attention_dropout="weights").train().pool_frames(y, mask)
    assert (weights.sum(dim=2) - 1).abs().max() > 0.2
    assert weights.sum(dim=2).mean().item() == pytest.approx(1, abs=0.1)
    pool = build(dropout=0.5).eval()
    assert torch.equal(pool.pool_frames(y, mask)[0], pool.pool_frames(y, mask)[0])


def test_start_of_training():
    torch.manual_seed(0)
    pool = LTDNN(32, 13, conv_dim=32, hidden_size=64)
    for name, parameter in pool.named_parameters():
        if "norm" in name:
            assert bool((parameter == (1 if name.endswith("weight") else 0)).all()), name
        elif name.startswith(("net", "layer_pool")) and name.endswith(("bias", "b1", "b2")):
            assert bool((parameter == 0).all()), name
        elif name.startswith("net") or "layer_pool" in name:
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(parameter)
            bound = math.sqrt(6 / fan_in) if name.endswith("w1") else math.sqrt(6 / (fan_in + fan_out))
            assert 0.9 * bound < parameter.abs().max() <= bound, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 1}, "num_layers must be at least 2"),
        ({"hidden_size": 10}, "hidden_size must be a multiple of num_heads=3"),
        ({"res2_scale": 5}, "res2_scale must divide conv_dim, got res2_scale=5 for conv_dim=12"),
        ({"net": "d3net", "depth": 5}, "depth must divide conv_dim"),
        ({"net": "xvector"}, "net must be 'ecapa' or 'd3net', got 'xvector'"),
        ({"masked": "none"}, "masked must be"),
        ({"deviation": "unbiased"}, "deviation must be"),
        ({"attention_dropout": "channels"}, "attention_dropout must be"),
        ({"dropout": 1.0}, "dropout must lie"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
        ({"pool_dim": 0}, "pool_dim must be at least 1"),
    ],
)
def test_bad_settings_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # whose own checks would speak first
    with pytest.raises(ValueError, match=message):
        create_pooling("l_tdnn", dim=6, **{"num_layers": 4, **SMALL, **options})


def test_bad_batches_are_refused():
    pool = build()
    with pytest.raises(ValueError, match=r"built for 4 layers .*got 3"):
        pool(torch.randn(2, 3, 5, 6))
    with pytest.raises(ValueError, match="at least 2 items a batch"):
        pool.train()(torch.randn(1, 4, 5, 6))
    assert pool.eval()(torch.randn(1, 4, 5, 6)).shape == (1, 5)
