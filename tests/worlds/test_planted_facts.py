"""Documents with planted facts are what they say, the look-up is always right, and scoring is by whole answers."""

from __future__ import annotations

import pytest
import torch

from cenote.backbones.embedded_language import load_embedded_language
from cenote.worlds.planted_facts import PlantedFacts, accuracy, answer_accuracy, look_up


@pytest.fixture(scope="module")
def tokenizer():
    return load_embedded_language()[1]


@pytest.fixture(scope="module")
def world(tokenizer):
    return PlantedFacts(tokenizer)


@pytest.mark.parametrize("length", [160, 257, 1024])
@pytest.mark.parametrize(("facts", "questions"), [(1, 1), (8, 1), (8, 3)])
def test_answers_stand_in_the_document(world, tokenizer, length, facts, questions):
    batch = world.batch(5, length, facts, None, questions, seed=length)
    assert batch.input_ids.shape == (5, length)
    assert (batch.input_ids[:, 0] == tokenizer.bos_token_id).all()
    assert (batch.answer_positions[:, -1, -1] == length - 1).all()
    assert torch.equal(batch.prompts, batch.input_ids[:, : batch.answer_positions[0, -1, 0]])
    size = batch.targets.shape[2]
    for row in range(5):
        ids = batch.input_ids[row]
        for q in range(questions):
            place, fact = int(batch.answer_positions[row, q, 0]), int(batch.asked[row, q])
            question = int(batch.question_lengths[row, q])
            planted = int(batch.fact_positions[row, fact])
            assert torch.equal(ids[place : place + size], batch.targets[row, q])
            assert torch.equal(ids[planted : planted + question + size], ids[place - question : place + size])
            text = tokenizer.decode(ids[planted : planted + question + size + 1])
            assert text.startswith(" The number of ")
            assert text.endswith(".")


def test_names_and_numbers_are_not_repeated(world, tokenizer):
    for row in world.batch(20, 512, 24, seed=3).input_ids:
        words = tokenizer.decode(row).split(" The number of ")[1:-1]
        names, numbers = zip(*[w.split(".")[0].split(" is ") for w in words], strict=True)
        assert len(set(names)) == len(set(numbers)) == 24
        assert all(len(n) == 4 and n.isdigit() for n in numbers)


@pytest.mark.parametrize("facts", [1, 6])
def test_depth_is_the_share_of_filler_in_front(tokenizer, facts):
    mark = tokenizer.encode("q", add_special_tokens=False)
    world = PlantedFacts(tokenizer, torch.tensor(mark))
    depths = [0.0, 0.25, 0.5, 0.8, 1.0]
    batch = world.batch(5, 301, facts, depths, seed=1)
    filler = batch.input_ids == mark[0]
    for row, depth in enumerate(depths):
        place = int(batch.fact_positions[row, batch.asked[row, 0]])
        total, before = int(filler[row].sum()), int(filler[row, :place].sum())
        assert before == round(depth * total)
        assert batch.depths[row, 0] == pytest.approx(before / total)
    assert batch.chance == 1 / facts


def test_random_depths_cover_the_document(world):
    depths = world.batch(200, 512, 4, seed=5).depths
    assert depths.min() < 0.05
    assert depths.max() > 0.95
    assert depths.mean() == pytest.approx(0.5, abs=0.08)


def test_grid_has_a_batch_for_each_depth(world):
    grid = world.grid(3, 256, (0.0, 0.5, 1.0))
    assert list(grid) == [0.0, 0.5, 1.0]
    for depth, batch in grid.items():
        assert batch.depths.flatten().tolist() == pytest.approx([depth] * 3, abs=0.01)


def test_seeds(world):
    first, again, other = (world.batch(4, 256, seed=s).input_ids for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not any(torch.equal(row, o) for row in first for o in other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("digits", [3, 4, 6])
def test_look_up_is_always_right(tokenizer, digits):
    batch = PlantedFacts(tokenizer, digits=digits).batch(16, 400, 10, None, 5, seed=2)
    assert torch.equal(look_up(batch), batch.targets)
    corrupted = batch.input_ids.clone()
    for row in range(16):  # another number in the text: the look-up reads the text, not the targets
        place = int(batch.fact_positions[row, batch.asked[row, 0]]) + int(batch.question_lengths[row, 0])
        corrupted[row, place] = 0
    changed = look_up(type(batch)(**{**vars(batch), "input_ids": corrupted}))
    assert (changed[:, 0, 0] == 0).all()
    assert torch.equal(changed[:, 1:], batch.targets[:, 1:])


def test_accuracy_counts_whole_answers_predicted_one_token_before(world, tokenizer):
    batch = world.batch(4, 256, 6, None, 2, seed=7)
    logits = torch.zeros(4, 256, len(tokenizer))
    logits[:, :-1].scatter_(2, batch.input_ids[:, 1:, None], 1.0)
    assert accuracy(logits, batch) == 1
    last = int(batch.answer_positions[2, 1, -1]) - 1
    logits[2, last] = 0
    logits[2, last, 5] = 1
    expected = torch.ones(4, 2, dtype=torch.bool)
    expected[2, 1] = False
    assert torch.equal(answer_accuracy(logits, batch), expected)
    assert accuracy(logits, batch) == 7 / 8
    assert accuracy(torch.zeros_like(logits), batch) == 0


def test_filler_of_the_callers(tokenizer):
    batch = PlantedFacts(tokenizer, "Call me Ishmael. ").batch(2, 200, 4)
    assert "Call me Ishmael. Call me Ishmael." in tokenizer.decode(batch.input_ids[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 40, "num_facts": 8}, "need 72 tokens, got 40"),
        ({"length": 999, "num_facts": 65}, "num_facts <= 64"),
        ({"length": 256, "num_facts": 2, "num_questions": 3}, "num_questions"),
        ({"length": 256, "depth": 1.5}, "depth"),
        ({"length": 256, "depth": [0.5]}, "depth"),
        ({"length": 256, "batch_size": 0}, "batch_size"),
    ],
)
def test_bad_requests(world, arguments, message):
    with pytest.raises(ValueError, match=message):
        world.batch(**{"batch_size": 3, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"filler": ""}, "empty"), ({"digits": 0}, "digits"), ({"names": ("Ada", "Ada")}, "names")],
)
def test_bad_worlds(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        PlantedFacts(tokenizer, **arguments)
