import dataclasses
import math
import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cenote.data.judged import Labels, Pairs, Relevance
from cenote.pooling import create_pooling, list_poolings
from cenote.pooling.base import Pooling
from cenote.tuning.contrastive import info_nce
from cenote.tuning.embedding import ContrastiveSettings, embed, train_embedding
from cenote.tuning.embedding_examples import examples_of, mine
from cenote.tuning.embedding_trainer import Collate, ContrastiveLoss, parameter_groups
from properties.options import COMPOSED, DIM, GRID, LAYERS, make

RNG = np.random.default_rng(0)
TINY = ContrastiveSettings(steps=(1, 0), batch_size=4, num_negatives=2)


def pairs(first, second, value):
    return Pairs(np.array(first), np.array(second), np.array(value, dtype=float))


def labels(values):
    return Labels(np.arange(len(values)) + 10, np.array(values), ("a", "b", "c"))


class TestFalseNegatives:
    torch.manual_seed(0)
    q, p, n = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 2, 8)

    def test_left_out_for_one_query_only(self):
        wrong = torch.rand(4, 12) < 0.3
        wrong[1, 1] = True  # its own positive stays
        mask = torch.tensor([[True, False]] * 4)
        documents = F.normalize(torch.cat([self.p, self.n.flatten(0, 1)]), dim=-1)
        kept = torch.cat([torch.ones(4, dtype=torch.bool), mask.flatten()])
        losses = []
        for i in range(4):
            logits = F.normalize(self.q[i], dim=0) @ documents.T / 0.1
            others = [j for j in range(12) if j == i or (kept[j] and not wrong[i, j])]
            losses.append(float(logits[others].logsumexp(0) - logits[i]))
        found = info_nce(self.q, self.p, self.n, temperature=0.1, negative_mask=mask, false_negatives=wrong)
        assert found.item() == pytest.approx(sum(losses) / 4, rel=1e-5)

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"must be \(4, 12\)"):
            info_nce(self.q, self.p, self.n, false_negatives=torch.zeros(4, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="without in_batch"):
            info_nce(self.q, self.p, self.n, in_batch=False, false_negatives=torch.zeros(4, 12, dtype=torch.bool))


class TestExamples:
    def test_pairs_count_in_both_directions_from_the_threshold_on(self):
        examples = examples_of(pairs([1, 2, 3, 4], [5, 6, 7, 8], [5, 4, 3.9, 1]), 0.8, 0.4)
        queries, positives = examples.draw(np.arange(len(examples)), RNG)
        assert sorted(zip(queries.tolist(), positives.tolist(), strict=True)) == [(1, 5), (2, 6), (5, 1), (6, 2)]
        # In between are neither positives nor negatives; the item itself never is one.
        assert examples.related(np.array([3, 4, 5, 1, 1]), np.array([7, 8, 1, 1, 2])).tolist() == [
            True,
            False,
            True,
            True,
            False,
        ]
        assert set(examples.related_to(3).tolist()) == {3, 7}
        for _ in range(20):
            drawn = examples.negatives(np.array([1, 3]), 4, RNG)
            assert drawn.valid.all()
            assert not {1, 5} & set(drawn.items[0].tolist())
            assert not {3, 7} & set(drawn.items[1].tolist())

    def test_relevance(self):
        relevance = Relevance(
            np.array([100, 101]), np.arange(5), np.array([0, 0, 1]), np.array([3, 4, 0]), np.ones(3)
        )  # fmt: skip
        examples = examples_of(relevance, 0.8, 0.4)
        queries, positives = examples.draw(np.arange(3), RNG)
        assert (queries.tolist(), positives.tolist()) == ([100, 100, 101], [3, 4, 0])
        assert set(examples.negatives(np.array([100]), 50, RNG).items.ravel().tolist()) == {0, 1, 2}
        alone = examples_of(dataclasses.replace(relevance, excluded=np.array([[0, 1]])), 0.8, 0.4)
        drawn = alone.negatives(np.array([100]), 50, RNG)
        assert set(drawn.items[drawn.valid].tolist()) == {0, 2}

    def test_labels(self):
        given = labels([0, 0, 0, 1, 1, 2, *[0] * 50])
        examples = examples_of(given, 0.8, 0.4)
        assert len(examples) == 55  # the only item of its class has no positive
        label = dict(zip(given.items.tolist(), given.label.tolist(), strict=True))
        seen = set()
        for _ in range(20):
            queries, positives = examples.draw(np.arange(55), RNG)
            negatives = examples.negatives(queries, 3, RNG)
            assert negatives.valid.all()
            for q, p, wrong in zip(queries.tolist(), positives.tolist(), negatives.items.tolist(), strict=True):
                assert q != p
                assert label[q] == label[p]
                assert all(label[w] != label[q] for w in wrong)
                seen |= set(wrong) if label[q] == 0 else set()
        assert seen == {13, 14, 15}
        assert set(examples.related_to(13).tolist()) == {13, 14}
        one = examples_of(labels([0, 0]), 0.8, 0.4)
        assert not one.negatives(np.array([10]), 2, RNG).valid.any()

    def test_nothing_to_learn_from(self):
        for judgement, message in (
            (pairs([1], [2], [0]), "a pair judged 0.8"),
            (labels([0, 1, 2]), "two items of one class"),
            (Relevance(np.array([1]), np.array([2]), *(np.array([], dtype=int),) * 2, np.array([])), "a relevant doc"),
        ):
            with pytest.raises(ValueError, match=message):
                examples_of(judgement, 0.8, 0.4)

    def test_mined_negatives_are_the_most_similar_acceptable_ones(self):
        torch.manual_seed(0)
        relevance = Relevance(
            np.arange(3), np.arange(3, 40), np.array([0, 1, 2, 2]), np.array([0, 1, 2, 3]), np.ones(4)
        )  # fmt: skip
        examples = examples_of(relevance, 0.8, 0.4)
        vectors = torch.randn(40, 6)
        vectors[3:7] = vectors[[0, 1, 2, 2]] + 0.3 * torch.randn(4, 6)
        vectors[30] = vectors[3]  # an unjudged duplicate of the first query's document
        items = np.arange(40)
        found = mine(examples, items, vectors, top_k=5, margin=0.9, chunk=2)
        unit = F.normalize(vectors, dim=-1)
        for row, (query, positive) in enumerate([(0, 3), (1, 4), (2, 5), (2, 6)]):
            score = unit @ unit[query]
            relevant = {0: {3}, 1: {4}, 2: {5, 6}}[query]
            allowed = [d for d in range(3, 40) if d not in relevant and score[d] < 0.9 * score[positive]]
            best = sorted(allowed, key=lambda d: -float(score[d]))[:5]
            assert found.items[row][found.valid[row]].tolist() == best
        assert 30 not in found.items[0]
        few = mine(examples, np.array([0, 1, 2, 3, 4, 5, 6, 9]), vectors[[0, 1, 2, 3, 4, 5, 6, 9]], top_k=9, margin=1.0)
        assert few.items.shape == (4, 9)
        assert few.valid.sum(1).max() <= 4


class TestBatch:
    def test_loss_is_that_of_the_written_out_rows(self):
        """Every item once in the batch, against all rows written out."""
        torch.manual_seed(0)
        table = torch.randn(30, 6)

        class Model(nn.Module):
            def forward(self, features):
                return {"sentence_embedding": table[features["input_ids"]]}

        relevance = Relevance(
            np.array([0, 1]), np.arange(2, 30), np.array([0, 0, 1]), np.array([0, 1, 2]), np.ones(3)
        )  # fmt: skip
        examples = examples_of(relevance, 0.8, 0.4)
        for in_batch in (True, False):
            collate = Collate(examples, None, 3, in_batch, seed=1)
            batch = {k.removeprefix("items_"): v for k, v in collate([{"row": i} for i in range(3)]).items()}
            assert len(set(batch["input_ids"].tolist())) == len(batch["input_ids"])
            q, p, n = (batch["input_ids"][batch[name]] for name in ("query", "positive", "negatives"))
            assert (q.tolist(), p.tolist()) == ([0, 0, 1], [2, 3, 4])
            wrong = None
            if in_batch:
                relevant = {0: {0, 2, 3}, 1: {1, 4}}
                documents = [*p.tolist(), *n.flatten().tolist()]
                wrong = torch.tensor([[d in relevant[int(one)] for d in documents] for one in q])
            expected = info_nce(table[q], table[p], table[n], in_batch=in_batch, false_negatives=wrong)
            torch.testing.assert_close(ContrastiveLoss(Model(), 0.05, in_batch)([batch]), expected)

    def test_queries_without_a_wrong_document_leave_the_second_stage(self):
        examples = examples_of(labels([0, 0]), 0.8, 0.4)
        with pytest.raises(ValueError, match="nothing to tell apart"):
            Collate(examples, None, 2, False, seed=0)([{"row": 0}])


def test_parameter_groups():
    pool = create_pooling("weighted_layers > efficient_probing(num_queries=4, qkv_bias=True)", dim=8, num_layers=2)
    groups = parameter_groups(pool, 0.1, 10.0, 0.01)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    inner = pool.pooling
    assert found[id(inner.queries)] == (1.0, 0.01)
    assert found[id(inner.value.weight)] == (0.1, 0.01)
    assert found[id(inner.value.bias)] == found[id(pool.reduction.weight)] == (0.1, 0.0)
    assert len(found) == 4

    class Spared(Pooling):
        no_weight_decay_parameters = ("w",)

        def __init__(self):
            super().__init__(4)
            self.w, self.frozen = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4), requires_grad=False)

        def _pool(self, tokens, mask):
            return tokens.mean(1) @ self.w, None

    (group,) = parameter_groups(Spared(), 0.1, 10.0, 0.01)
    assert (group["weight_decay"], len(group["params"])) == (0.0, 1)


class World:
    """Two views of each of 48 signals; one flagged token of eight carries it, the rest are noise."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        signal = torch.randn(48, 16, generator=generator)
        self.tokens = torch.randn(96, 8, 24, generator=generator)
        self.tokens[:, :, 0] = 0
        place = torch.randint(0, 8, (96,), generator=generator)
        self.tokens[torch.arange(96), place, 8:] = signal.repeat_interleave(2, 0)
        self.tokens[torch.arange(96), place, 0] = 3
        self.first = np.arange(0, 96, 2)

    @torch.inference_mode()  # as a backbone's output is
    def read(self, items):
        return self.tokens[items] * 1.0, torch.ones(len(items), 8, dtype=torch.bool)

    def found(self, pool):
        vectors = F.normalize(embed(pool, self.read, np.arange(96)), dim=-1)
        scores = vectors @ vectors.T
        return float((scores.fill_diagonal_(-9).argmax(1) == torch.arange(96) ^ 1).float().mean())


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture
def pool():
    torch.manual_seed(0)
    return create_pooling("efficient_probing(num_queries=1)", dim=24)


LEARN = ContrastiveSettings(steps=(100, 30), lr=5e-3)


@pytest.mark.parametrize("kind", ["pairs", "relevance", "labels"])
def test_learns_what_belongs_together(world, pool, kind):
    first = world.first
    judgement = {
        "pairs": Pairs(first, first + 1, np.full(48, 5.0)),
        "relevance": Relevance(first, first + 1, np.arange(48), np.arange(48), np.ones(48)),
        "labels": Labels(np.arange(96), np.arange(96) // 2, tuple(map(str, range(48)))),
    }[kind]
    start = world.found(pool)
    assert start < 0.1
    trained = train_embedding(pool, world.read, judgement, LEARN)
    assert world.found(trained) > 0.9
    assert world.found(pool) == start  # the one given is as it was
    assert not trained.training


def test_same_seed_same_weights_and_nothing_left_behind(world, pool, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    judgement = Pairs(world.first, world.first + 1, np.ones(48))
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    done = []
    settings = ContrastiveSettings(steps=(4, 2), batch_size=8)
    one = train_embedding(pool, world.read, judgement, settings, progress=lambda *at: done.append(at))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()
    assert random.getstate() == state[2]
    torch.manual_seed(8)
    other = train_embedding(pool, world.read, judgement, settings, evaluate=lambda p: float(torch.rand(1)) and 0.0)
    last = train_embedding(pool, world.read, judgement, settings)
    assert done == [(i + 1, 6) for i in range(6)]
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")
    for a, b, start in zip(one.parameters(), last.parameters(), pool.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, start)
    # A score that never rises keeps the start.
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), pool.parameters(), strict=True))


def test_best_state_is_returned(world, pool):
    judgement = Pairs(world.first, world.first + 1, np.ones(48))
    seen = []

    def evaluate(p):
        assert not p.training
        seen.append([x.detach().clone() for x in p.parameters()])
        return [0.1, 0.2, 0.9, 0.3, 0.4][len(seen) - 1]

    settings = ContrastiveSettings(steps=(4, 4), batch_size=8, evaluations=2)
    best = train_embedding(pool, world.read, judgement, settings, evaluate=evaluate)
    assert len(seen) == 5
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), seen[2], strict=True))
    assert not torch.equal(seen[2][0], seen[4][0])


TRAINABLE = [spec for spec in (*list_poolings(), *COMPOSED) if any(True for _ in make(spec).parameters())]


@pytest.mark.parametrize("spec", TRAINABLE)
def test_every_trainable_pooling(spec):
    torch.manual_seed(0)
    pool = make(spec)
    hidden = torch.randn(12, LAYERS, math.prod(GRID), DIM)
    tokens = hidden if pool.layers == "all" else hidden[:, -1]
    judgement = Labels(np.arange(12), np.arange(12) % 3, ("a", "b", "c"))
    trained = train_embedding(pool, lambda items: (tokens[items], None), judgement, TINY)
    before, after = (torch.cat([p.detach().flatten() for p in x.parameters()]) for x in (pool, trained))
    assert not torch.equal(before, after)
    assert after.isfinite().all()


def test_bad_input(world):
    judgement = Pairs(world.first, world.first + 1, np.ones(48))
    with pytest.raises(ValueError, match="no trainable parameter"):
        train_embedding(create_pooling("mean", dim=24), world.read, judgement)
    for wrong in (
        {"steps": (0, 0)}, {"batch_size": 0}, {"num_negatives": 0}, {"temperature": 0.0}, {"positive_margin": 1.2},
        {"similar": 0.2, "dissimilar": 0.4}, {"warmup": 1.0}, {"lr": -1.0}, {"evaluations": 0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ContrastiveSettings(**wrong)
