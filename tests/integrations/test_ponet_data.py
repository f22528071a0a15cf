"""Pairs, sentences and masks: what is in them, counted."""

import pytest
import torch

from cenote.integrations.ponet_data import ELSEWHERE, FOLLOWS, SWAPPED, PoNetCollator, encode_sentences, sentence_pairs

CLS, SEP, PAD, MASK = 1, 2, 0, 3


def documents(count=40, sentences=12, longest=9, seed=0):
    """Every token says where it stands: 10000 * document + 100 * sentence + place + 10 (below 100 a sentence)."""
    lengths = torch.randint(1, longest + 1, (count, sentences), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[[10_000 * d + 100 * s + p + 10 for p in range(length)] for s, length in enumerate(row)]
            for d, row in enumerate(lengths)]  # fmt: skip


def halves(pair):
    ids = pair["input_ids"]
    cut = ids.index(SEP)
    assert ids[0] == CLS
    assert ids[-1] == SEP
    assert ids.count(SEP) == 2
    return ids[1:cut], ids[cut + 1 : -1]


def test_labels_say_what_became_of_b():
    pairs = sentence_pairs(documents(200), cls_id=CLS, sep_id=SEP, max_length=40, seed=1)
    counts = [0, 0, 0]
    for pair in pairs:
        first, second = halves(pair)
        label = pair["next_sentence_label"]
        counts[label] += 1
        assert first
        assert second
        assert not set(first) & set(second)
        one, two = ({token // 10_000 for token in half} for half in (first, second))
        assert len(one) == len(two) == 1
        # Trimming may leave a gap at the seam but never changes the order.
        if label == FOLLOWS:
            assert one == two
            assert max(first) < min(second)
        if label == SWAPPED:
            assert one == two
            assert max(second) < min(first)
        assert first == sorted(first)
        assert second == sorted(second)
        if label == ELSEWHERE and one == two:  # another chunk of the same document
            gap = min(second) // 100 - max(first) // 100, min(first) // 100 - max(second) // 100
            assert max(gap) >= 1
    total = sum(counts)
    assert total > 350
    assert all(abs(count / total - 1 / 3) < 0.08 for count in counts), counts


def test_rows_fit_and_segments_are_sentences():
    lengths = []
    for pair in sentence_pairs(documents(), cls_id=CLS, sep_id=SEP, max_length=40):
        ids, segments, special = pair["input_ids"], pair["segment_ids"], pair["special_mask"]
        lengths.append(len(ids))
        assert len(ids) == len(segments) == len(special) == len(pair["token_type_ids"])
        assert [token < 4 for token in ids] == special
        sentence = [token if alone else token // 100 for token, alone in zip(ids, special, strict=True)]
        starts = [0, *(int(a != b or x) for a, b, x in zip(sentence, sentence[1:], special[1:], strict=False))]
        assert segments == torch.tensor(starts).cumsum(0).tolist()  # from 0, one more at every change
        assert pair["token_type_ids"] == [0] * (ids.index(SEP) + 1) + [1] * (len(ids) - ids.index(SEP) - 1)
    assert max(lengths) == 40
    assert min(lengths) < 30


def test_long_halves_are_trimmed_alike_from_both_ends():
    long = [[[10 + p for p in range(60)], [200 + p for p in range(60)]]]
    fronts = []
    for seed in range(20):
        (pair,) = sentence_pairs(long, cls_id=CLS, sep_id=SEP, max_length=23, short_chance=0.0, seed=seed)
        first, second = halves(pair)
        assert len(first) == len(second) == 10
        assert pair["next_sentence_label"] == FOLLOWS
        fronts.append(first[0] - 10)
        assert first == list(range(first[0], first[0] + 10))
    assert 15 < sum(fronts) / 20 < 35  # of 50 tokens half leave in front


def test_a_single_sentence_never_meets_itself():
    """A sentence that fills a chunk is joined to its neighbour instead of being taken twice."""
    long = [[10_000 * 1 + 100 * s + p + 10 for p in range(30)] for s in range(7)]
    for document in (long, long[:3], long[:2], [[], *long[:2], []]):
        pairs = sentence_pairs([document], cls_id=CLS, sep_id=SEP, max_length=20, short_chance=0.5)
        assert pairs
        for pair in pairs:
            first, second = halves(pair)
            assert first
            assert second
            assert not set(first) & set(second)
    assert sentence_pairs([[[5, 6, 7]]], cls_id=CLS, sep_id=SEP) == []
    two = sentence_pairs([[[5, 6, 7]], [[8, 9]]], cls_id=CLS, sep_id=SEP)
    assert [pair["next_sentence_label"] for pair in two] == [ELSEWHERE] * 2
    assert {tuple(map(tuple, halves(pair))) for pair in two} == {((5, 6, 7), (8, 9)), ((8, 9), (5, 6, 7))}


def test_every_token_is_used_about_once():
    world = documents()
    whole = [token for document in world for sentence in document for token in sentence]
    pairs = sentence_pairs(world, cls_id=CLS, sep_id=SEP, max_length=60, short_chance=0.0)
    kept = [t for pair in pairs if pair["next_sentence_label"] != ELSEWHERE for half in halves(pair) for t in half]
    assert len(kept) == len(set(kept))
    assert set(kept) < set(whole)


def test_seeds_repeat():
    a, b, c = (sentence_pairs(documents(), cls_id=CLS, sep_id=SEP, max_length=40, seed=seed) for seed in (3, 3, 4))
    assert a == b != c


def test_sentences_of_a_long_text():
    text = encode_sentences([[10, 11], [], [12], [13, 14]], cls_id=CLS, sep_id=SEP, max_length=20)
    assert text["input_ids"] == [CLS, 10, 11, 12, 13, 14, SEP]
    assert text["segment_ids"] == [0, 1, 1, 2, 3, 3, 4]
    assert text["special_mask"] == [True, *[False] * 5, True]
    cut = encode_sentences([[10, 11], [12], [13, 14]], cls_id=CLS, sep_id=SEP, max_length=5)
    assert cut["input_ids"] == [CLS, 10, 11, 12, SEP]
    assert cut["segment_ids"] == [0, 1, 1, 2, 3]


def test_masks_are_berts():
    words = list(range(4, 1000))
    examples = [encode_sentences([list(range(10, 10 + n))], cls_id=CLS, sep_id=SEP) for n in (400, 200, 3)] * 20
    collator = PoNetCollator(pad_id=PAD, mask_id=MASK, words=words)
    batch, again = collator(examples), collator(examples)
    assert not torch.equal(batch["input_ids"], again["input_ids"])
    original = PoNetCollator(pad_id=PAD)(examples)["input_ids"]
    asked = batch["labels"] != -100
    assert asked.sum(dim=1).tolist() == [60, 30, 1] * 20  # 0.45 of a token is one
    assert torch.equal(batch["labels"][asked], original[asked])
    assert torch.equal(batch["input_ids"][~asked], original[~asked])
    assert not (asked & batch["special_mask"].bool()).any()
    assert not asked[batch["attention_mask"] == 0].any()
    shown = batch["input_ids"][asked]
    masked, kept = (shown == MASK).double().mean(), (shown == original[asked]).double().mean()
    assert abs(masked - 0.8) < 0.04
    assert abs(kept - 0.1) < 0.03
    assert set(shown[(shown != MASK) & (shown != original[asked])].tolist()) <= set(words)


def test_batches_are_padded():
    examples = [{"input_ids": [1, 5, 2], "segment_ids": [0, 1, 2], "special_mask": [True, False, True], "label": 1},
                {"input_ids": [1, 2], "segment_ids": [0, 1], "special_mask": [True, True], "label": 0}]  # fmt: skip
    batch = PoNetCollator(pad_id=9)(examples)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["segment_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_bad_settings():
    with pytest.raises(ValueError, match="at least 5"):
        sentence_pairs([[[5], [6]]], cls_id=CLS, sep_id=SEP, max_length=4)
    with pytest.raises(ValueError, match="at least 3, got 2"):
        encode_sentences([[5]], cls_id=CLS, sep_id=SEP, max_length=2)
    with pytest.raises(ValueError, match="words to draw from"):
        PoNetCollator(pad_id=0, mask_id=3)
