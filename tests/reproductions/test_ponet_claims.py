"""PoNet's reproduction: its worlds are what they say, and its findings compare what they name."""

import torch

from cenote.reproductions import available
from cenote.reproductions.base import finding
from cenote.reproductions.ponet import REPRODUCTION, accuracy_findings
from cenote.reproductions.ponet_cost import DENSE_COST, PONET_COST, cost_findings, sentences
from cenote.reproductions.ponet_exact import exact_findings
from cenote.reproductions.ponet_figure import draw_ponet
from cenote.reproductions.ponet_keyword import CLS, KEYWORDS, MODELS, NOT, RATES, SEP, FarKeyword, keyword_accuracies
from cenote.reproductions.ponet_pretraining import OWN, TOPICS, WORDS, novels, pre_train, stories
from cenote.reproductions.run import load_reproduction
from cenote.worlds.base import IGNORE


def test_it_is_offered():
    assert "ponet" in available()
    assert load_reproduction("ponet").claim


def test_exact_claims_hold():
    found = exact_findings()
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}
    assert len({f.claim for f in found}) == len(found) == 11


def test_one_keyword_stands_far_from_the_class_token():
    world = FarKeyword()
    inputs, targets = batch = world.sample(2000, 0)
    keyword = (inputs >= 3) & (inputs < 3 + KEYWORDS)
    assert (keyword.sum(dim=1) == 1).all()
    place = keyword.long().argmax(dim=1)
    assert place.min() >= world.length // 2
    before = inputs[torch.arange(2000), place - 1]
    assert not ((before == CLS) | (before == SEP)).any()
    assert torch.equal(targets[:, 0] >= 2, before == NOT)
    assert (targets[:, 1:] == IGNORE).all()
    assert torch.equal(world.best(batch), targets)
    shares = torch.bincount(targets[:, 0], minlength=4) / 2000
    assert (shares - 0.25).abs().max() < 0.04
    # Elsewhere the word in front of the keyword says nothing: it stands in most sequences of either kind.
    elsewhere = ((inputs == NOT).sum(dim=1) - (before == NOT).long()) > 0
    assert abs(elsewhere[before == NOT].double().mean() - elsewhere[before != NOT].double().mean()) < 0.05


def test_a_model_of_single_tokens_guesses():
    (first, second), rate = keyword_accuracies(MODELS["feed-forward only"], (0, 1), 20)
    assert abs(first - 25) < 4
    assert abs(second - 25) < 4
    assert rate in RATES


def test_the_rate_is_chosen_once_and_on_other_texts(monkeypatch):
    trained, judged = [], []

    def train(mixer, seed, steps, lr):
        trained.append((seed, lr))
        return lr

    def accuracy(lr, world, items, seed=1_000_000):
        judged.append(seed)
        return 0.9 if (lr == RATES[1]) == (seed == 2_000_000) else 0.4

    monkeypatch.setattr("cenote.reproductions.ponet_keyword.train_keyword", train)
    monkeypatch.setattr("cenote.reproductions.ponet_keyword.sequence_accuracy", accuracy)
    assert keyword_accuracies("ponet", (5, 6, 7), 1) == ([40.0] * 3, RATES[1])
    assert trained == [(5, RATES[0]), (5, RATES[1]), (6, RATES[1]), (7, RATES[1])]
    assert judged.count(2_000_000) == 2


def test_stories_have_a_topic_and_stages_in_order():
    documents, vocabulary = stories(50, 3)
    stages = []
    for document in documents:
        groups = [[(word - WORDS) // OWN for word in sentence] for sentence in document]
        topics = {group for sentence in groups for group in sentence if group < TOPICS}
        assert len(topics) == 1
        stages += [(number, group - TOPICS) for number, s in enumerate(groups) for group in s if group >= TOPICS]
    assert all(stage == number // 2 for number, stage in stages)
    assert max(word for document in documents for sentence in document for word in sentence) < vocabulary


def test_novels_become_paragraphs(tmp_path):
    import gzip

    text = "A cat sat on the mat. The cat ran! Why; who knows? The mat was a mat. A dog came by. It ran too. Oh no."
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    documents, vocabulary = novels(tmp_path, most=3)
    assert vocabulary == WORDS + 3
    assert [len(document) for document in documents] == [5]
    # "a", "the" and "mat" stand there three times each and are 5, 6 and 7; every other word is 4.
    assert documents[0] == [[5, 4, 4, 4, 6, 7], [6, 4, 4], [4, 4], [6, 7, 4, 5, 7], [5, 4, 4, 4]]


def test_pre_training_runs_and_compares_with_frequencies():
    found = pre_train(*stories(200, 0), seed=0, steps=60)
    assert 3.8 < found.unigram < 4.3  # 66 words, not all alike: at most ln 66 = 4.19 and a little for the test
    assert found.words < found.unigram


def test_findings_take_leads_seed_by_seed():
    made = {name: [80.0, 90.0] for name in MODELS}
    made["softmax attention"] = [82.0, 95.0]
    made["PoNet without the local pooling"] = [81.0, 93.0]
    found = {f.claim: f for f in accuracy_findings(made, "a task")}
    against = next(f for claim, f in found.items() if "softmax attention" in claim)
    assert against.values == (-2.0, -5.0)
    assert against.verdict == "inconclusive"
    local = next(f for claim, f in found.items() if "without the local" in claim)
    assert local.values == (1.0, 3.0)
    assert local.passed == (True, False)
    assert len(found) == 5


def test_cost_is_measured_by_length_and_drawn(tmp_path):
    found = cost_findings(lengths=(32, 64), rounds=1)
    by_claim = {f.claim: f for f in found}
    assert len(by_claim[PONET_COST].values) == len(by_claim[DENSE_COST].values) == 2
    memory = next(f for f in found if "memory" in f.claim)
    assert 1.9 < memory.measured < 2.05
    points = finding("More.", "above 0", [1.0, -1.0], lambda v: v > 0, unit="points of accuracy")
    draw_ponet([*found, points], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert REPRODUCTION.figure is draw_ponet


def test_sentences_of_the_cost_curve():
    context = sentences(60)
    assert context.segment_ids[0, [0, 1, 25, 26, 58, 59]].tolist() == [0, 1, 1, 2, 3, 4]
    assert context.special_mask[0].nonzero().flatten().tolist() == [0, 59]
