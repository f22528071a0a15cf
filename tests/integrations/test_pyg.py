"""Poolings as PyTorch Geometric aggregations: equal to the padded form, to PyG's own, and inside its models."""

import inspect

import pytest
import torch

pytest.importorskip("torch_geometric")
from torch_geometric.nn import GATConv, JumpingKnowledge, SAGEConv, aggr
from torch_geometric.nn.models import GCN

from cenote.integrations.pyg import HistoryAggregation, PoolingAggregation
from cenote.pooling import create_pooling, list_poolings
from cenote.pooling.registry import pooling_class

DIM, LAYERS, SIZES = 96, 3, (5, 1, 9, 3, 4)
GRID = (3, 3)
CLASSES = {name: pooling_class(name) for name in list_poolings()}


def make(name):
    return create_pooling(name, dim=DIM, num_layers=LAYERS, grid=GRID)


ORDER_FREE = [name for name in CLASSES if make(name).permutation_invariant and not CLASSES[name].needs_grid]
BOUND = [name for name in CLASSES if not make(name).permutation_invariant]


def rows(*axes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.repeat_interleave(torch.tensor([0, 1, 2, 4, 5]), torch.tensor(SIZES))  # set 3 is empty
    order = torch.randperm(len(index), generator=generator)
    return torch.randn(len(index), *axes, DIM, generator=generator), index[order]


def padded(x, index):
    sets = [x[index == s] for s in (0, 1, 2, 4, 5)]
    out = torch.zeros(len(sets), max(SIZES), *x.shape[1:])
    for s, own in enumerate(sets):
        out[s, : len(own)] = own
    mask = torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]
    return (out if x.ndim == 2 else out.transpose(1, 2)), mask


@pytest.mark.parametrize("name", ORDER_FREE)
def test_equals_the_padded_form(name):
    torch.manual_seed(0)
    pool = make(name).eval()
    every = pool.layers == "all"
    aggregation = (HistoryAggregation if every else PoolingAggregation)(pool)
    x, index = rows(*((LAYERS,) if every else ()))
    with torch.no_grad():
        found = aggregation(x, index, dim_size=7)
        wanted = pool(*padded(x, index))
        torch.testing.assert_close(found[[0, 1, 2, 4, 5]], wanted, rtol=1e-4, atol=1e-5)
        assert not found[[3, 6]].any()
        order = index.argsort(stable=True)
        ptr = torch.bincount(index, minlength=7).cumsum(0)
        by_ptr = aggregation(x[order], ptr=torch.cat([ptr.new_zeros(1), ptr]))
        torch.testing.assert_close(by_ptr, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["weighted_layers > mean", "concat_layers > mean", "mean_layers > gem"])
def test_layer_reductions_take_stacked_or_listed_states(spec):
    aggregation = HistoryAggregation(spec, dim=DIM, num_layers=LAYERS)
    x, index = rows(LAYERS)
    found = aggregation(x, index, dim_size=7)
    assert torch.equal(aggregation(list(x.unbind(1)), index, dim_size=7), found)
    torch.testing.assert_close(found[[0, 1, 2, 4, 5]], aggregation.pooling(*padded(x, index)))
    if spec.startswith("concat"):
        jumped = aggr.MeanAggregation()(JumpingKnowledge("cat")(list(x.unbind(1))), index, dim_size=7)
        torch.testing.assert_close(found, jumped)


def test_histograph_takes_what_jumping_knowledge_takes():
    aggregation = HistoryAggregation("histograph", dim=DIM)
    x, index = rows(LAYERS)
    found = aggregation(x, index, dim_size=7)
    torch.testing.assert_close(aggregation(list(x.unbind(1)), index, dim_size=7), found)
    torch.testing.assert_close(aggregation(x), aggregation.pooling(x.transpose(0, 1)[None]))
    with pytest.raises(ValueError, match="axis 0"):
        aggregation(x, index, dim=-2)


@pytest.mark.parametrize("name", BOUND)
def test_order_dependent_poolings_are_refused_by_name(name):
    pool = make(name)
    with pytest.raises(ValueError, match=f"{name} depends on the order"):
        (PoolingAggregation if pool.layers == "last" else HistoryAggregation)(pool)


def peers():
    power = aggr.PowerMeanAggregation(learn=False, channels=1)
    return [
        ("mean", {}, aggr.MeanAggregation(), lambda x: x),
        ("max", {}, aggr.MaxAggregation(), lambda x: x),
        # With p = 1 and positive input both power means are the mean; PyG clamps to (0, 100), GGeM to a floor.
        ("ggem", {"num_groups": 1, "p": 1.0}, power, torch.sigmoid),
    ]


@pytest.mark.parametrize(("name", "options", "peer", "prepare"), peers(), ids=lambda v: v if isinstance(v, str) else "")
def test_agrees_with_pygs_own(name, options, peer, prepare):
    known = inspect.signature(CLASSES[name]).parameters
    aggregation = PoolingAggregation(name, dim=DIM, **{k: v for k, v in options.items() if k in known})
    x, index = rows()
    x = prepare(x)
    torch.testing.assert_close(aggregation(x, index, dim_size=7), peer(x, index, dim_size=7))
    stacked = torch.stack([x, x + 1])
    torch.testing.assert_close(aggregation(stacked, index, dim_size=7), peer(stacked, index, dim_size=7))
    torch.testing.assert_close(
        aggregation(stacked.transpose(0, 1), index, dim_size=7, dim=0),
        peer(stacked.transpose(0, 1), index, dim_size=7, dim=0),
    )


def test_inside_models_and_layers():
    torch.manual_seed(0)
    x, batch = rows()
    edges = torch.randint(len(x), (2, 60))
    for conv in (SAGEConv, GATConv):
        ours, theirs = (
            conv(DIM, 8, aggr=PoolingAggregation("mean", dim=DIM if conv is SAGEConv else 8)),
            conv(DIM, 8, aggr="mean"),
        )
        theirs.load_state_dict(ours.state_dict(), strict=False)
        torch.testing.assert_close(ours(x, edges), theirs(x, edges))
    learned = SAGEConv(DIM, 8, aggr=PoolingAggregation("efficient_probing(num_queries=4)", dim=DIM))
    before = {name: p.clone() for name, p in learned.named_parameters()}
    learned(x, edges).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned.parameters())
    learned.reset_parameters()
    assert any(not torch.equal(p, before[name]) for name, p in learned.named_parameters() if "aggr" in name)
    # Nothing to aggregate: every node is an empty set.
    assert torch.equal(ours(x, edges[:, :0]), theirs(x, edges[:, :0]))
    assert PoolingAggregation("gem", dim=DIM)(x.new_zeros(2, 0, DIM), batch[:0], dim_size=3).shape == (2, 3, DIM)
    network, readout = GCN(DIM, 8, 2), PoolingAggregation("gem", dim=8)
    vectors = readout(network(x, edges), batch, dim_size=7)
    assert vectors.shape == (7, 8)
    assert vectors.isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PoolingAggregation("histograph", dim=8), "use HistoryAggregation"),
        (lambda: HistoryAggregation("mean", dim=8), "use PoolingAggregation"),
        (lambda: PoolingAggregation("mean"), "needs dim"),
        (lambda: PoolingAggregation("dolg", dim=8), "dolg reads a grid"),
        (lambda: HistoryAggregation("mean_layers > dolg", dim=8, num_layers=2), "dolg reads a grid"),
        (lambda: PoolingAggregation(create_pooling("mean", dim=8), dim=9), "already built"),
        (lambda: PoolingAggregation("meen", dim=8), "did you mean"),
        (lambda: PoolingAggregation("mean", dim=8)(torch.zeros(4, 8), torch.zeros(4).long(), dim=-1), "channels"),
        (lambda: PoolingAggregation("mean", dim=8)(torch.zeros(4, 8), torch.tensor([0, 0, 5, 1]), dim_size=3), "are 3"),
        (lambda: HistoryAggregation("histograph", dim=8)(torch.zeros(4, 2, 8), ptr=torch.tensor([0, 4]), dim_size=3),
         "describes 1 sets"),
    ],
)  # fmt: skip
def test_misuse(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        (PoolingAggregation, "clip", "clip depends on the order"),
        (PoolingAggregation, "l_tdnn", "l_tdnn depends on the order"),
        (HistoryAggregation, "l_tdnn", "l_tdnn depends on the order"),
        (PoolingAggregation, "multi_layer_pooling", "reads all layers: use HistoryAggregation"),
        (HistoryAggregation, "multi_layer_pooling", "needs further options: 'num_layers'"),
    ],
)
def test_names_that_need_more_than_a_width_are_refused_in_words(kind, spec, message):
    with pytest.raises(ValueError, match=message):
        kind(spec, dim=DIM)


@pytest.mark.parametrize("ptr", [[1, 3, 5], [0, 4, 2, 5], []])
def test_starts_that_do_not_rise_from_zero_are_refused(ptr):
    for aggregation, x in (
        (PoolingAggregation("mean", DIM), rows()[0][:5]),
        (HistoryAggregation("histograph", DIM, num_layers=2), rows(2)[0][:5]),
    ):
        with pytest.raises(ValueError, match="ptr must rise from 0"):
            aggregation(x, ptr=torch.tensor(ptr, dtype=torch.long))
