"""HistoGraph against the formulas written out plainly, its options, its sparse form, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cenote.ops.layer_history import layer_positions, signed_weights
from cenote.ops.ragged import bucket_sets, pool_sets
from cenote.ops.self_attention import FUSED_FROM, masked_self_attention
from cenote.pooling import create_pooling
from cenote.pooling.histograph import HistoGraph
from cenote.pooling.sets import pool_rows
from cenote.reproductions.histograph_exact import exact_findings

SIZES = (5, 1, 7, 3, 2)
VARIANTS = (
    {},
    {"hidden_dim": 15, "num_heads": 3},
    {"normalisation": "softmax", "residual": True},
    {"weights": "node", "normalisation": "softmax"},
    {"weights": "batch"},
    {"residual": True, "layer_norm": True, "bias": False},
    {"positions": False},
)


def build(seed=0, dim=8, **options):
    torch.manual_seed(seed)
    pool = HistoGraph(dim, **options)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return pool.eval()


def graphs(layers=4, dim=8, sizes=SIZES, seed=1):
    """Histories laid end to end and padded (in NaN), with batch index and mask."""
    history = torch.randn(sum(sizes), layers, dim, generator=torch.Generator().manual_seed(seed))
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    padded = torch.full((len(sizes), layers, max(sizes) + 2, dim), float("nan"))
    mask = torch.zeros(len(sizes), max(sizes) + 2, dtype=torch.bool)
    for g, size in enumerate(sizes):
        padded[g, :, 1 : 1 + size] = history[batch == g].transpose(0, 1)
        mask[g, 1 : 1 + size] = True
    return history, batch, padded, mask


def plain(pool, history, batch):
    """One graph after the other, every projection of every layer, torch's own attention."""
    attention = nn.MultiheadAttention(pool.out_dim, pool.node_attn.num_heads, batch_first=True)
    attention.load_state_dict(pool.node_attn.state_dict())
    x = F.linear(history, pool.emb_hist.weight, pool.emb_hist.bias)
    if pool.positions:
        x = x + layer_positions(history.shape[1], pool.out_dim)
    query, keys = x[:, -1] @ pool.w_q.weight.T, x @ pool.w_k.weight.T
    scores = torch.einsum("nd,nld->nl", query, keys) / pool.out_dim**0.5
    vectors, nodes = [], torch.zeros(len(x), pool.out_dim)
    for g in range(int(batch.max()) + 1):
        own = batch == g
        c = scores[own]
        c = c if pool.weights == "node" else (scores if pool.weights == "batch" else c).mean(0, keepdim=True)
        alpha = c.softmax(-1) if pool.normalisation == "softmax" else c / c.sum(-1, keepdim=True)
        h = (alpha[:, :, None] * x[own]).sum(1)
        z = attention(h[None], h[None], h[None], need_weights=False)[0][0]
        z = z + h if pool.residual else z
        z = z if pool.norm is None else pool.norm(z)
        nodes[own] = z
        vectors.append(z.mean(0))
    return torch.stack(vectors), nodes


def close(actual, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", VARIANTS)
def test_every_form_is_the_plain_one(options):
    pool = build(**options)
    history, batch, padded, mask = graphs()
    with torch.no_grad():
        vectors, nodes = plain(pool, history, batch)
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
        sparse, read = pool.read_graphs(history[order], batch[order]), pool.read(padded, mask)
        close(pool(padded, mask), vectors)
        close(read.graph, vectors)
        close(sparse.graph, vectors)
        close(sparse.nodes, nodes[order])
        close(pool.nodes(padded, mask)[mask], nodes)
        assert not pool.nodes(padded, mask)[~mask].any()
        if options.get("weights") != "node":
            close(read.layer_weights, sparse.layer_weights)
            close(read.layer_scores, sparse.layer_scores)
        close(sparse.layer_weights.sum(-1), torch.ones(len(sparse.layer_weights)))


def test_exact_claims_hold():
    found = exact_findings()
    assert len(found) == 15
    assert [(each.claim, each.values) for each in found if each.verdict != "holds"] == []


def test_position_vectors_and_their_odd_end():
    even, odd = layer_positions(3, 6), layer_positions(3, 7)
    assert even[0].tolist() == [0, 1] * 3
    angle = 2 / 10000 ** (2 / 6)
    close(even[2, 2:4], torch.tensor([angle, 0.0]).sin() + torch.tensor([0.0, torch.tensor(angle).cos()]))
    assert odd.shape == (3, 7)
    close(odd[2, 6], (torch.tensor(2.0) / 10000 ** (6 / 7)).sin())


def test_the_floor_keeps_the_sign_and_is_reported():
    scores = torch.tensor([[1.0, -1.0], [1.0, -1.0 + 1e-7], [1.0 - 1e-7, -1.0], [2.0, 1.0], [0.0, 0.0]])
    weights, floored = signed_weights(scores, eps=1e-3)
    assert floored.tolist() == [True, True, True, False, True]
    close(weights[:4, 0], torch.tensor([1e3, 1e3, -1e3, 2 / 3]), rtol=1e-5)
    assert weights[4].tolist() == [0.5, 0.5]
    exact, acted = signed_weights(torch.tensor([1.0, -0.99]))
    close(exact, torch.tensor([100.0, -99.0]), rtol=1e-4)
    assert not acted
    with pytest.raises(ValueError, match="positive"):
        signed_weights(scores, eps=0.0)


def test_cancelled_scores_of_a_graph_are_reported_and_finite():
    pool = build(dim=4, positions=False, bias=False, num_heads=2)
    with torch.no_grad():
        for layer in (pool.emb_hist, pool.w_q, pool.w_k):
            layer.weight.copy_(torch.eye(4))
    x = torch.randn(1, 1, 3, 4)
    read = pool.read(torch.cat([-x, x], dim=1))
    assert read.floored.tolist() == [True]
    assert read.graph.isfinite().all()
    x.requires_grad_()
    pool(torch.cat([-x, x], dim=1)).sum().backward()
    assert x.grad.isfinite().all()
    assert pool.read(torch.zeros(1, 2, 3, 4)).layer_weights.tolist() == [[0.5, 0.5]]


def test_empty_graphs_need_a_size_and_give_zeros():
    pool = build()
    history, batch, _, _ = graphs()
    gap = torch.where(batch >= 2, batch + 1, batch)
    with pytest.raises(ValueError, match=r"\[2\] have no rows"):
        pool.read_graphs(history, gap)
    read = pool.read_graphs(history, gap, size=8)
    assert read.graph.shape == (8, 8)
    assert not read.graph[[2, 6, 7]].any()
    assert not read.layer_weights[[2, 6, 7]].any()
    assert not read.floored[[2, 6, 7]].any()
    close(read.graph[[0, 1, 3, 4, 5]], pool.read_graphs(history, batch).graph)
    assert pool.read_graphs(history[:0], batch[:0], size=2).graph.tolist() == [[0.0] * 8] * 2
    layers = [history[:0, layer] for layer in range(history.shape[1])]
    assert pool.read_graphs(layers, batch[:0], size=2).graph.tolist() == [[0.0] * 8] * 2
    with pytest.raises(ValueError, match="list of"):
        pool.read_graphs([], batch[:0], size=2)


def test_widths_that_differ_have_a_projection_each():
    widths = (3, 5, 8)
    pool = build(widths=widths)
    assert pool.num_layers == 3
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 6, width, generator=generator) for width in widths]
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    # By hand: projected layers are a stack that an identity projection reads.
    same = HistoGraph(8).eval()
    same.load_state_dict({**pool.state_dict(), "emb_hist.weight": torch.eye(8), "emb_hist.bias": torch.zeros(8)}
                         | {}, strict=False)  # fmt: skip
    stack = torch.stack([layer(x) for layer, x in zip(pool.emb_hist, layers, strict=True)], dim=1)
    close(pool(layers, mask), same(stack, mask))
    flat = [x[mask] for x in layers]
    close(pool.read_graphs(flat, torch.tensor([0] * 6 + [1] * 4)).graph, pool(layers, mask))
    again = HistoGraph.from_reference(pool.state_dict())
    assert torch.equal(again(layers, mask), pool(layers, mask))
    with pytest.raises(ValueError, match=r"widths \[3, 5, 8\], got \[3, 8, 5\]"):
        pool([layers[0], layers[2], layers[1]], mask)
    with pytest.raises(ValueError, match="projection of its own"):
        build()(layers, mask)
    with pytest.raises(ValueError, match="same nodes"):
        pool([layers[0][:, :5], *layers[1:]], mask)
    with pytest.raises(TypeError, match="floating-point layers"):
        pool([layers[0].long(), *layers[1:]], mask)


def nan_in(layer):
    history = torch.zeros(2, 3, 4, 8)
    history[1, layer, 2, 5] = float("nan")
    return history


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        (torch.zeros(2, 2, 4, 8), ValueError, "history of 3 layers, got 2"),
        (nan_in(1), ValueError, "not finite in layer 1, graph 1, node 2"),
        (nan_in(2), ValueError, "not finite in layer 2"),
        (torch.zeros(2, 3, 4, 8).long(), TypeError, "floating-point tokens, got torch.int64"),
        ([], ValueError, "list of"),
    ],
)
def test_bad_histories(history, error, message):
    with pytest.raises(error, match=message):
        HistoGraph(8, num_layers=3)(history)


def test_a_bad_node_is_named_by_its_graph():
    history = torch.zeros(6, 3, 8)
    history[4, 1, 0] = float("inf")
    with pytest.raises(ValueError, match="layer 1, graph 2, node 1"):
        HistoGraph(8).read_graphs(history, torch.tensor([0, 2, 1, 1, 2, 0]))
    with pytest.raises(ValueError, match="some layers, got 0"):
        HistoGraph(8)(torch.zeros(2, 0, 4, 8))


def test_batch_index_of_any_whole_type():
    pool = build()
    history, batch, _, _ = graphs()
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(pool.read_graphs(history, batch.to(dtype)).graph, pool.read_graphs(history, batch).graph)


@pytest.mark.parametrize(
    ("batch", "size", "error", "message"),
    [
        (torch.zeros(4), None, TypeError, "whole numbers"),
        (torch.zeros(3, dtype=torch.long), None, ValueError, r"shape \(4,\)"),
        (torch.tensor([0, 0, 1, 2]), 2, ValueError, "goes up to 2, but there are 2"),
        (torch.tensor([-1, 0, 0, 0]), None, ValueError, "start at 0"),
        (torch.tensor([0, 0, 2, 2]), None, ValueError, "no set may be empty"),
    ],
)
def test_bad_batch_indices(batch, size, error, message):
    with pytest.raises(error, match=message):
        HistoGraph(8).read_graphs(torch.zeros(4, 3, 8), batch, size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "1, 2, 4, 8 would"),
        ({"normalisation": "sigmoid"}, "'signed' or 'softmax'"),
        ({"weights": "layer"}, "'graph', 'node' or 'batch'"),
        ({"widths": (3, 5)}, "the last of width 8"),
        ({"eps": 0.0}, "eps"),
        ({"num_layers": 0}, "num_layers"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HistoGraph(8, **options)


def test_reference_weights_must_fit():
    state = build(hidden_dim=16).state_dict()
    assert HistoGraph.from_reference(state, in_dim=8, hidden_dim=16, num_layers=4, num_heads=2).num_layers == 4
    with pytest.raises(ValueError, match="in_dim contradicts"):
        HistoGraph.from_reference(state, in_dim=9)
    with pytest.raises(ValueError, match="do not fit"):
        HistoGraph.from_reference({k: v for k, v in state.items() if k != "w_k.weight"})
    with pytest.raises(ValueError, match="expected emb_hist"):
        HistoGraph.from_reference({})


def test_autocast_does_not_narrow_the_weights():
    pool = build()
    history, batch, padded, mask = graphs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pool.read_graphs(history, batch)
        dense = pool(padded, mask)
    with torch.no_grad():
        assert torch.equal(inside.layer_weights, pool.read_graphs(history, batch).layer_weights)
        assert torch.equal(dense, pool(padded, mask))


def test_large_sets_take_the_fused_kernel_and_give_the_same():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, FUSED_FROM + 5, 4, generator=generator)
    mask = torch.rand(2, FUSED_FROM + 5, generator=generator) > 0.3
    scores = (q @ k.mT / 2).masked_fill(~mask[:, None, None], float("-inf"))
    close(masked_self_attention(q, k, v, mask), scores.softmax(-1) @ v)
    close(masked_self_attention(q[:, :, :9], k[:, :, :9], v[:, :, :9], mask[:, :9]),
          scores[..., :9, :9].softmax(-1) @ v[:, :, :9])  # fmt: skip


def test_buckets_pad_little_and_lose_nothing():
    sizes = [1, 600, 3, 4, 5, 8, 9, 2, 1, 16] + [20] * 50
    index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    buckets = bucket_sets(index, len(sizes) + 1)
    assert sum(bucket.mask.numel() for bucket in buckets) <= 2 * len(index)
    rows = torch.cat([bucket.rows[bucket.mask] for bucket in buckets])
    assert rows.sort().values.tolist() == list(range(len(index)))
    for bucket in buckets:
        assert torch.equal(index[bucket.rows][bucket.mask], bucket.sets[:, None].expand_as(bucket.mask)[bucket.mask])
    assert len(bucket_sets(index, len(sizes), together=True)) == 1
    assert bucket_sets(index[:0], 3) == []
    with pytest.raises(ValueError, match="all 3 sets are empty"):
        pool_sets(lambda x, mask: x.sum(1), torch.zeros(0, 2), index[:0], 3)


def test_batch_statistics_cover_all_sets_at_once():
    """Groups of similar size must not become batches of their own where a pooling normalises over its batch."""
    torch.manual_seed(0)
    norm, same = create_pooling("aim", dim=12, num_heads=4).train(), create_pooling("aim", dim=12, num_heads=4).train()
    same.load_state_dict(norm.state_dict())
    rows, index = torch.randn(30, 12), torch.repeat_interleave(torch.arange(4), torch.tensor([2, 20, 5, 3]))
    padded = torch.zeros(4, 20, 12)
    mask = torch.zeros(4, 20, dtype=torch.bool)
    for g in range(4):
        count = int((index == g).sum())
        padded[g, :count], mask[g, :count] = rows[index == g], True
    close(pool_rows(norm, rows, index), same(padded, mask))
    for name, statistic in norm.named_buffers():
        close(statistic, same.get_buffer(name))


def test_products_that_overflow_are_refused_and_not_nan():
    pool = build()
    history, batch, padded, mask = graphs()
    large = history.clone()
    large[batch == 2] *= 1e30
    padded[2] *= 1e30
    for call in (
        lambda: pool(padded.nan_to_num(), mask),
        lambda: pool.read(padded.nan_to_num(), mask),
        lambda: pool.read_graphs(large, batch),
    ):
        with pytest.raises(ValueError, match="vector of graph 2 is not finite: its history is too large"):
            call()
    assert pool(padded.nan_to_num()[[0, 1, 3, 4]], mask[[0, 1, 3, 4]]).isfinite().all()
