"""The attention-only classifier: its plain form, its fast form, its training and its measures."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cenote.worlds.context_classification import ContextClassification
from cenote.worlds.induction import (
    InductionNetwork,
    attention_mass,
    context_label_accuracy,
    item_label_association,
    label_places,
    matching_labels,
    target_item_label_association,
    target_label_attention,
)
from cenote.worlds.induction_training import sgd_step, stacked_logits, train_induction

WORLD = ContextClassification(num_classes=32, num_labels=8, pairs=3, dim=15, max_pairs=4, p_fresh=0.5, num_fresh=16)


def by_hand(network, sequence):
    """One sequence, token by token."""
    tokens = list(sequence)
    for head in network.attn:
        after = []
        for i, token in enumerate(tokens):
            scores = torch.stack([(head.q @ token) @ (head.k @ tokens[j]) for j in range(i + 1)])
            weights = scores.softmax(dim=0)
            after.append(token + sum(w * (head.v @ tokens[j]) for j, w in enumerate(weights)))
        tokens = after
    last = tokens[-1]
    for layer in network.mlp:
        last = torch.relu(layer.weight @ last + layer.bias)
    return network.readout.weight @ last


@torch.no_grad()
def test_logits_token_by_token():
    network = InductionNetwork.for_world(WORLD)
    inputs = WORLD.sample(4, 0).inputs
    torch.testing.assert_close(
        network(inputs), torch.stack([by_hand(network, s) for s in inputs]), atol=1e-5, rtol=1e-4
    )


def test_attention_is_causal_and_sums_to_one():
    trace = InductionNetwork.for_world(WORLD).trace(WORLD.sample(10, 0).inputs)
    assert len(trace.attention) == len(trace.residuals) == 2
    for weights in trace.attention:
        assert weights.shape == (10, 1, 7, 7)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(10, 1, 7))
        assert weights.triu(1).abs().max() == 0
        assert weights.min() >= 0


def test_parameters_and_their_spread():
    network = InductionNetwork(128, 32, 63)
    assert sum(p.numel() for p in network.parameters()) == 151_555
    assert network.attn[0].k.std().item() == pytest.approx(63**-0.5, rel=0.03)
    assert network.mlp[2].weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.03)
    assert network.readout.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
    # Drawn apart, also the third layer and the readout.
    assert not torch.allclose(network.mlp[2].weight[:32] / network.readout.weight, torch.tensor(2**0.5))


@pytest.mark.parametrize("layers", [1, 2])
def test_the_fast_form_is_the_same_function_with_the_same_gradient(layers):
    networks = [InductionNetwork.for_world(WORLD, layers).double() for _ in range(3)]
    batches = [WORLD.sample(6, seed) for seed in range(3)]
    state = {
        n: torch.stack([net.state_dict()[n] for net in networks]).requires_grad_() for n in networks[0].state_dict()
    }
    inputs = torch.stack([batch.inputs for batch in batches]).double()
    logits = stacked_logits(state, inputs)
    for run, (network, batch) in enumerate(zip(networks, batches, strict=True)):
        torch.testing.assert_close(logits[run], network(batch.inputs.double()), atol=1e-10, rtol=1e-8)
        F.cross_entropy(network(batch.inputs.double()), batch.targets).backward()
        loss = F.cross_entropy(logits[run], batch.targets)
        gradients = torch.autograd.grad(loss, list(state.values()), retain_graph=True)
        for name, gradient in zip(state, gradients, strict=True):
            own = network.get_parameter(name).grad
            torch.testing.assert_close(gradient[run], own, atol=1e-10, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
            assert gradient[(run + 1) % 3].abs().max() == 0


def test_training_is_plain_sgd_and_runs_do_not_meet():
    options = {"steps": 5, "batch": 8, "lr": 0.1, "decay": 0.01, "every": 5, "items": 20}
    both = train_induction(WORLD, seeds=(3, 9), **options)
    alone = train_induction(WORLD, seeds=(9,), ahead=2, **{**options, "steps": 0})
    # The same run by the plain form, from the same weights and batches.
    network, world = alone.networks[0], replace(WORLD, seed=9)
    block = next(world.batches(8, 1_000_003 * 10, 16))
    for step in range(5):
        loss = F.cross_entropy(network(block.inputs[step]), block.targets[step])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.copy_(0.99 * parameter - 0.1 * gradient)
    for name, expected in network.state_dict().items():
        torch.testing.assert_close(both.networks[1].state_dict()[name], expected, atol=1e-5, rtol=1e-4)
    assert both.measures["loss"].shape == (2, 2)
    assert both.steps == (0, 5)


def test_a_short_training_confines_itself_to_the_context():
    world = ContextClassification(num_classes=32, num_labels=16, pairs=2, dim=15, max_pairs=2, p_fresh=0.8)
    runs = train_induction(world, 800, lr=0.1, every=400, items=500, memory=True)
    assert set(runs.measures) == {"loss", "accuracy", "cla", "ila1", "tila2", "tla2", "iw", "ic2"}
    assert runs.measures["loss"][-1, 0] < runs.measures["loss"][0, 0] - 0.3
    assert runs.measures["cla"][-1, 0] > 0.5 > runs.measures["cla"][0, 0]
    assert runs.first("cla", 0.5)[0] in (400.0, 800.0)
    assert runs.first("accuracy", 1.1) == [float("inf")]
    assert runs.at("cla", [800]) == [runs.measures["cla"][-1, 0].item()]
    assert runs.first("loss", 100, below=True) == [0.0]


def test_sgd_step_does_not_scale_the_decay():
    weight = torch.tensor([2.0])
    sgd_step([weight], (torch.tensor([3.0]),), lr=0.1, decay=0.5)
    assert weight.item() == pytest.approx(0.5 * 2 - 0.3)


def test_measures_by_hand():
    attention = torch.zeros(2, 1, 5, 5)
    attention[0, 0] = torch.tensor(
        [[1, 0, 0, 0, 0], [0.7, 0.3, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0.1, 0.9, 0], [0.1, 0.2, 0.3, 0.4, 0]]
    )
    attention[1, 0] = torch.tensor(
        [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0.3, 0.7, 0], [0.0, 0.6, 0.0, 0.3, 0.1]]
    )
    labels = label_places(5)
    assert labels.tolist() == [1, 3]
    assert item_label_association(attention, labels).item() == pytest.approx((0.7 + 0.1 + 0.5 + 0.3) / 4)
    assert target_label_attention(attention, labels).item() == pytest.approx((0.6 + 0.9) / 2)
    matches = matching_labels(torch.tensor([[4, 7, 7], [5, 5, 5]]))
    assert matches.int().tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 1, 0]]
    assert target_item_label_association(attention, matches).item() == pytest.approx((0.4 + 0.9) / 2)
    logits = torch.eye(4)[[0, 2, 3]]
    assert context_label_accuracy(logits, torch.tensor([[0, 1], [1, 3], [3, 3]])).item() == pytest.approx(2 / 3)


def test_measures_read_eager_attention_of_a_language_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=16,
        vocab_size=20,
        attn_implementation="eager",
    )
    model = transformers.LlamaModel(config).eval()
    symbols = torch.randint(20, (3, 6)).repeat(1, 2)
    with torch.no_grad():
        attention = model(symbols, output_attentions=True).attentions
    previous = item_label_association(attention[0], torch.arange(1, 12))
    assert previous.shape == (4,)
    torch.testing.assert_close(previous, attention[0].diagonal(-1, 2, 3).mean(dim=(0, 2)))
    # The induction score: the last symbol stood at place 5, so 6 is what followed it.
    follows = torch.zeros(3, 12, dtype=torch.bool)
    follows[:, 6] = True
    torch.testing.assert_close(
        target_item_label_association(attention[1], follows), attention[1][:, :, -1, 6].mean(dim=0)
    )


def test_bad_input():
    with pytest.raises(ValueError, match="at least 1"):
        InductionNetwork(8, 0, 4)
    with pytest.raises(ValueError, match="width 8"):
        InductionNetwork(8, 2, 4)(torch.zeros(1, 3, 9))
    with pytest.raises(ValueError, match="at least one query"):
        attention_mass(torch.ones(1, 1, 2, 2), torch.zeros(0, dtype=torch.long), torch.ones(1, 1, 2, dtype=torch.bool))
    three = InductionNetwork.for_world(WORLD, 3)
    state = {name: weight[None] for name, weight in three.state_dict().items()}
    with pytest.raises(ValueError, match="one or two heads, got 3"):
        stacked_logits(state, WORLD.sample(2, 0).inputs[None])
    assert isinstance(three, nn.Module)
