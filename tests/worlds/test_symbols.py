"""Worlds of symbols: each generator is what it says, and its best predictor is right."""

import statistics

import pytest
import torch

from cenote.worlds.base import IGNORE
from cenote.worlds.characters import CharacterText
from cenote.worlds.copying import FixedOffsetCopy
from cenote.worlds.listops import SYMBOLS, ListOps, evaluate, to_text
from cenote.worlds.recall import AssociativeRecall
from cenote.worlds.training import fit_sequences

WORLDS = [AssociativeRecall(), AssociativeRecall(pairs=5, queries=2, shuffled=False), FixedOffsetCopy(), ListOps()]
TEXT = "the cat sat on the mat and the rat sat on the hat. " * 40


@pytest.mark.parametrize("world", [*WORLDS, CharacterText(TEXT, length=16)], ids=lambda w: w.name)
def test_seed_decides_the_batch(world):
    first, again, other = world.sample(20, 1), world.sample(20, 1), world.sample(20, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.inputs, other.inputs)
    streamed = [batch for batch, _ in zip(world.stream(20, 1), range(2), strict=False)]
    assert torch.equal(streamed[0].inputs, first.inputs)
    assert not torch.equal(streamed[1].inputs, first.inputs)
    with pytest.raises(ValueError, match="at least one item"):
        world.sample(0, 0)


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_best_predictor_is_always_right(world):
    batch = world.sample(200, 0)
    assert torch.equal(world.best(batch), batch.targets)


def test_recall_shows_distinct_keys_and_asks_for_them():
    world = AssociativeRecall(pairs=6, queries=4)
    batch = world.sample(100, 0)
    assert batch.inputs.shape == (100, world.length) == (100, 16)
    for row, target in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        pairs = dict(zip(row[:12:2], row[1:12:2], strict=True))
        assert len(pairs) == 6
        assert [pairs[query] for query in row[12:]] == target[12:]
        assert set(target[:12]) == {IGNORE}
    orders = {
        tuple(row[12:].tolist().index(key) if key in row[12:] else -1 for key in row[:12:2]) for row in batch.inputs
    }
    assert len(orders) > 20


def test_copying_repeats_the_string():
    world = FixedOffsetCopy(offset=5, vocabulary=9)
    batch = world.sample(50, 0)
    assert torch.equal(batch.inputs[:, :4], batch.inputs[:, 5:])
    assert torch.equal(batch.targets[:, 4:], torch.cat([batch.inputs[:, 5:], batch.inputs[:, 4:5]], dim=1))


def naive(words):
    """Value of a ListOps expression by recursion, the words it takes removed from the list."""
    word = words.pop(0)
    if word.isdigit():
        return int(word)
    arguments = []
    while words[0] != "]":
        arguments.append(naive(words))
    words.pop(0)
    functions = {"[MIN": min, "[MAX": max, "[MED": lambda a: int(statistics.median(a)), "[SM": lambda a: sum(a) % 10}
    return functions[word](arguments)


def test_listops_values_are_those_of_a_recursive_reading():
    world = ListOps(min_length=6, max_length=50)
    batch = world.sample(300, 0)
    lengths = batch.mask.sum(dim=1)
    assert lengths.min() >= 6
    assert lengths.max() <= 50
    assert torch.equal(batch.mask, torch.arange(50) < lengths[:, None])
    for row, target in zip(batch.inputs, batch.targets.tolist(), strict=True):
        words = to_text(row).split()
        assert naive(words) == target
        assert not words
    assert len(batch.targets.unique()) == 10
    assert {SYMBOLS[s] for s in batch.inputs.unique().tolist()} == set(SYMBOLS)


def test_listops_nests_no_deeper_than_asked():
    opens = (
        ListOps(max_depth=2, max_length=200, nesting=0.9).sample(200, 0).inputs[..., None] == torch.arange(11, 15)
    ).any(-1)
    closes = ListOps(max_depth=2, max_length=200, nesting=0.9).sample(200, 0).inputs == 15
    assert (opens.long() - closes.long()).cumsum(dim=1).max() == 2


@pytest.mark.parametrize("text", [[11, 2, 15, 15], [11, 15], [11, 2, 3], [2, 3]])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError, match="not a ListOps expression"):
        evaluate(torch.tensor([text]))


def test_characters_never_meet_the_held_out_part_and_decode_back():
    train, test = CharacterText(TEXT, 16, held_out=0.25), CharacterText(TEXT, 16, part="test", held_out=0.25)
    cut = round(0.75 * len(TEXT))
    for world, own in ((train, TEXT[:cut]), (test, TEXT[cut:])):
        batch = world.sample(64, 0)
        assert all(world.decode(row) in own for row in batch.inputs)
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert train.decode(train.encode("the cat")) == "the cat"
    with pytest.raises(ValueError, match="no letter"):
        train.encode("Z")


def test_counting_predicts_as_counts_do():
    world = CharacterText("abababac" * 50, length=8, order=2, held_out=0.1)
    batch = world.sample(4, 0)
    p = world.best(batch)
    torch.testing.assert_close(p.sum(-1), torch.ones(4, 8, dtype=torch.float64))
    text = world.text[: round(0.9 * len(world.text))]
    a, b, c = (world.encode(x).item() for x in "abc")
    where = (batch.inputs[0, 1:] == b).nonzero()[0].item() + 1
    assert p[0, where, a] > 0.99  # an a always follows a b
    # after "ba": b or c, as often as they are counted, a little drawn to the shorter context
    seen = {x: sum(text.startswith("ba" + x, at) for at in range(len(text))) for x in "bc"}
    after = next(t for t in range(1, 8) if world.decode(batch.inputs[0, t - 1 : t + 1]) == "ba")
    assert abs(p[0, after, b].item() - seen["b"] / (seen["b"] + seen["c"])) < 0.02
    assert p[0, after, c] > 0.2
    assert world.best_loss(50) < world.unigram_entropy()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AssociativeRecall(pairs=40), "pairs <= keys"),
        (lambda: AssociativeRecall(queries=9), "queries <= pairs"),
        (lambda: FixedOffsetCopy(offset=0), "offset"),
        (lambda: ListOps(min_length=50, max_length=20), "symbols"),
        (lambda: ListOps(nesting=1.0), "nesting"),
        (lambda: CharacterText(TEXT, part="validation"), "part"),
        (lambda: CharacterText("short", length=16), "do not fit"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_training_that_diverges_says_so():
    class Exploding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(64))

        def forward(self, symbols):
            return (self.weight / 0).expand(*symbols.shape, 64)

    with pytest.raises(FloatingPointError, match="diverged at step 0"):
        fit_sequences(Exploding(), FixedOffsetCopy(), steps=3)
