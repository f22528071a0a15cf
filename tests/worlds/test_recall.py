"""That recall is learned in seconds where the keys see the token before, and not where they do not."""

import pytest
import torch

from cenote.worlds.models import SequenceModel
from cenote.worlds.recall import AssociativeRecall
from cenote.worlds.training import fit_sequences, sequence_accuracy

WORLD = AssociativeRecall(pairs=3, keys=8, values=8)


def trained(rule, convolve):
    torch.manual_seed(0)
    options = {"num_heads": 1, "conv_on": "k" if convolve else "", "conv_size": 3}
    model = SequenceModel(WORLD.vocabulary, 24, 1, rule, options=options)
    fit_sequences(model, WORLD, 150, batch=32, lr=1e-2)
    return sequence_accuracy(model, WORLD, items=300)


@pytest.mark.parametrize("rule", ["linear_attention", "local_constant"])
def test_one_layer_with_a_convolution_on_the_keys_recalls(rule):
    assert trained(rule, convolve=True) > 0.97


def test_without_the_convolution_it_guesses_among_the_values_shown():
    assert 0.2 < trained("local_constant", convolve=False) < 0.6


def test_symbols_stand_out_beside_what_a_block_adds():
    """The residual stream at the start: if the mixers' output were the larger, recall would not form in time."""
    model = SequenceModel(WORLD.vocabulary, 48, 2, "softmax_attention")
    symbols = WORLD.sample(8, 0).inputs
    with torch.no_grad():
        embedded = model.embedding(symbols)
        added = model.stack.blocks[0](embedded) - embedded
    assert added.std() < embedded.std()
    assert model.head.weight.std() < 0.03
