import math

import pytest
import torch
import torch.nn.functional as F

from cenote.tuning.contrastive import hard_negative_nll, info_nce, select_hard_negatives


def cosine(a, b):
    return float(F.cosine_similarity(a, b, dim=0))


def plain_loss(queries, documents_of, temperature):
    """Documents of each query, its positive first: the definition, one query at a time."""
    losses = []
    for query, documents in zip(queries, documents_of, strict=True):
        logits = [cosine(query, d) / temperature for d in documents]
        losses.append(math.log(sum(math.exp(x) for x in logits)) - logits[0])
    return sum(losses) / len(losses)


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 3, 8)


def test_own_negatives_only(rows):
    q, p, n = rows
    expected = plain_loss(q, [[p[i], *n[i]] for i in range(5)], 0.1)
    assert info_nce(q, p, n, temperature=0.1, in_batch=False).item() == pytest.approx(expected, rel=1e-5)


def test_in_batch_and_hard_negatives(rows):
    q, p, n = rows
    documents = [[p[i], *(p[j] for j in range(5) if j != i), *n.flatten(0, 1)] for i in range(5)]
    expected = plain_loss(q, documents, 0.05)
    assert info_nce(q, p, n).item() == pytest.approx(expected, rel=1e-5)
    assert hard_negative_nll(q, p, n.flatten(0, 1)).item() == pytest.approx(expected, rel=1e-5)


def test_in_batch_without_hard_negatives(rows):
    q, p, _ = rows
    documents = [[p[i], *(p[j] for j in range(5) if j != i)] for i in range(5)]
    assert info_nce(q, p, temperature=0.02).item() == pytest.approx(plain_loss(q, documents, 0.02), rel=1e-5)
    assert hard_negative_nll(q, p, scale=50).item() == pytest.approx(plain_loss(q, documents, 0.02), rel=1e-5)


def test_negatives_left_out(rows):
    q, p, n = rows
    mask = torch.tensor([[True, False, True]] * 4 + [[False, False, True]])
    own = [[p[i], *n[i][mask[i]]] for i in range(5)]
    assert info_nce(q, p, n, in_batch=False, negative_mask=mask).item() == pytest.approx(
        plain_loss(q, own, 0.05), rel=1e-5
    )
    every = [[p[i], *(p[j] for j in range(5) if j != i), *n[mask]] for i in range(5)]
    assert info_nce(q, p, n, negative_mask=mask).item() == pytest.approx(plain_loss(q, every, 0.05), rel=1e-5)


def test_other_rows_count_in_the_first_stage_only(rows):
    q, p, n = rows
    for in_batch in (True, False):
        together = info_nce(q, p, n, in_batch=in_batch)
        apart = torch.stack([info_nce(q[i : i + 1], p[i : i + 1], n[i : i + 1], in_batch=in_batch) for i in range(5)])
        if in_batch:
            assert together > apart.mean() + 0.1
        else:
            torch.testing.assert_close(together, apart.mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_give_a_float32_loss(rows, dtype):
    q, p, n = (x.to(dtype) for x in rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(q, p, n)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(q.float(), p.float(), n.float()))


def test_scale_of_embeddings_is_irrelevant(rows):
    q, p, n = rows
    torch.testing.assert_close(info_nce(q * 7, p * 0.1, n * 3), info_nce(q, p, n))


class TestSelectHardNegatives:
    scores = torch.tensor([[0.9, 0.76, 0.75, 0.2, 0.1], [0.5, 0.4, 0.3, -0.2, -0.9]])
    positive = torch.tensor([0.8, 0.4])

    def test_best_below_the_margin(self):
        picked = select_hard_negatives(self.scores, self.positive, top_k=2)  # limits 0.76 and 0.38
        assert picked.chosen.tolist() == [[2, 3], [2, 3]]
        assert picked.valid.all()

    def test_margin_of_one_admits_all_below_the_positive(self):
        picked = select_hard_negatives(self.scores, self.positive, top_k=3, margin=1.0)
        assert picked.chosen.tolist() == [[1, 2, 3], [2, 3, 4]]

    def test_too_few_candidates_are_marked(self):
        picked = select_hard_negatives(self.scores, self.positive, top_k=4, margin=0.5)
        assert picked.valid.tolist() == [[True, True, False, False], [True, True, False, False]]
        assert picked.chosen[:, :2].tolist() == [[3, 4], [3, 4]]

    def test_planted_duplicates_of_the_positive_are_removed(self):
        torch.manual_seed(0)
        q = F.normalize(torch.randn(50, 32), dim=-1)
        p = F.normalize(q + 0.1 * torch.randn(50, 32), dim=-1)
        duplicates = F.normalize(p + 0.002 * torch.randn(50, 32), dim=-1)
        documents = torch.cat([duplicates, F.normalize(torch.randn(200, 32), dim=-1)])
        picked = select_hard_negatives(q @ documents.T, (q * p).sum(1), top_k=5)
        assert not (picked.chosen == torch.arange(50)[:, None])[picked.valid].any()

    def test_negative_positive_score_keeps_its_sense(self):
        picked = select_hard_negatives(torch.tensor([[-0.1, -0.42, -0.5]]), torch.tensor([-0.4]), top_k=3)
        assert picked.chosen[picked.valid[None].squeeze(0)].tolist() == [2]

    def test_bad_input(self):
        for margin in (0, 1.1, -0.5):
            with pytest.raises(ValueError, match="margin"):
                select_hard_negatives(self.scores, self.positive, top_k=1, margin=margin)
        with pytest.raises(ValueError, match="one positive score"):
            select_hard_negatives(self.scores, self.positive[:1], top_k=1)
        with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
            select_hard_negatives(self.scores, torch.tensor([0.8, math.nan]), top_k=1)
        with pytest.raises(ValueError, match=r"top_k must lie in 1\.\.5"):
            select_hard_negatives(self.scores, self.positive, top_k=6)
        with pytest.raises(ValueError, match="NaN"):
            select_hard_negatives(self.scores * math.nan, self.positive, top_k=1)


def test_bad_input(rows):
    q, p, n = rows
    for loss in (info_nce, hard_negative_nll):
        with pytest.raises(ValueError, match="one to one"):
            loss(q, p[:4])
        with pytest.raises(TypeError, match=r"(?i)float"):
            loss(q.long(), p)
        with pytest.raises(ValueError, match="at least one"):
            loss(q[:0], p[:0])
    with pytest.raises(ValueError, match="temperature"):
        info_nce(q, p, temperature=0)
    with pytest.raises(ValueError, match="scale"):
        hard_negative_nll(q, p, scale=-1.0)
    with pytest.raises(ValueError, match="negatives must be"):
        info_nce(q, p, n[:4])
    with pytest.raises(ValueError, match=r"negatives must be \(negatives, 8\)"):
        hard_negative_nll(q, p, torch.randn(3, 7))
    with pytest.raises(ValueError, match="there are none"):
        info_nce(q, p, in_batch=False)
    with pytest.raises(ValueError, match="there are none"):
        info_nce(q, p, n[:, :0], in_batch=False)
    with pytest.raises(ValueError, match=r"row\(s\) \[2\]"):
        info_nce(q, p, n, in_batch=False, negative_mask=(torch.arange(5) != 2)[:, None].expand(-1, 3))
    with pytest.raises(ValueError, match="negative_mask"):
        info_nce(q, p, n, negative_mask=torch.ones(5, 2, dtype=torch.bool))
