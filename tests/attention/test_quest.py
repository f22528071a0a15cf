import pytest
import torch
from transformers import DynamicCache

from attention_hosts import decoder, padded
from cenote.attention import Quest
from cenote.attention.host import cache_argument
from cenote.attention.quest import PageBounds
from cenote.compress.teacher_forced import teacher_forced_logits
from reference.masked_decoding import masked_decoding

SIZE, PAGES = 4, 3


def rule(dense_layers):
    """Bounds page by page over each row's real tokens."""

    def kept(layer, call, logits, seen):
        chosen = seen.clone()
        heads, offset = call.query.shape[1], call.mask.offset
        if layer in dense_layers or offset == 0:
            return chosen
        for row in range(len(seen)):
            real = seen[row, 0, -1].nonzero().flatten()
            pages = real.split(SIZE)
            for head in range(heads):
                q = call.query[row, head, -1]
                keys = call.key[row, head * call.key.shape[1] // heads]
                bound = [torch.maximum(q * keys[p].amin(0), q * keys[p].amax(0)).sum() for p in pages]
                bound[-1] = torch.tensor(float("inf"))
                best = torch.stack(bound).topk(min(PAGES, len(pages))).indices.tolist()
                chosen[row, head, -1] = False
                for p in best:
                    chosen[row, head, -1, pages[p]] = True
        return chosen

    return kept


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_equals_masked_dense_attention_over_the_best_pages(family):
    model = decoder(family)
    ids, mask = padded((41, 30, 11))
    with masked_decoding(model, rule((0,))):
        expected = teacher_forced_logits(model, ids, mask.bool(), prompt=33)
    with Quest(budget=SIZE * PAGES, page_size=SIZE, dense_layers=(0,))(model):
        got = teacher_forced_logits(model, ids, mask.bool(), prompt=33)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert float((expected - teacher_forced_logits(model, ids, mask.bool(), prompt=33)).abs().max()) > 1e-2


def test_bounds_grow_token_by_token_as_they_do_at_once():
    key = torch.randn(3, 2, 90, 8)
    real = torch.ones(3, 90, dtype=torch.bool)
    real[0, :13], real[2, :50] = False, False
    whole, grown = PageBounds(SIZE), PageBounds(SIZE)
    whole.extend(key, real)
    for end in (20, 21, 22, 60, 61, 90):
        grown.extend(key[:, :, :end], real[:, :end])
    for row in range(3):
        tokens = key[row][:, real[row]]
        for page, part in enumerate(tokens.split(SIZE, dim=1)):
            for bounds in (whole, grown):
                assert torch.equal(bounds.most[row, :, page], part.amax(1))
                assert torch.equal(bounds.least[row, :, page], part.amin(1))


def test_no_logit_exceeds_its_page_bound():
    key, query = torch.randn(2, 2, 37, 8), torch.randn(2, 6, 1, 8)
    bounds = PageBounds(SIZE)
    bounds.extend(key, None)
    scores = bounds.scores(query, torch.tensor([10, 10]))
    logits = (query * key.repeat_interleave(3, dim=1)).sum(-1)
    assert bool((logits <= scores.repeat_interleave(SIZE, dim=-1)[..., :37] + 1e-5).all())


def test_tokens_taken_back_leave_no_trace_in_the_bounds():
    model = decoder()
    ids, _ = padded((30,))
    with torch.no_grad(), Quest(budget=8, page_size=4, dense_layers=())(model):
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], **cache_argument(cache))
        model(ids[:, 25:29], **cache_argument(cache))
        cache.crop(-4)
        got = model(ids[:, 20:21], **cache_argument(cache)).logits
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], **cache_argument(cache))
        torch.testing.assert_close(got, model(ids[:, 20:21], **cache_argument(cache)).logits)


def test_a_cache_begun_outside_is_read_whole():
    model = decoder()
    ids, _ = padded((30,))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], **cache_argument(cache))
        with Quest(budget=8, page_size=4, dense_layers=())(model):
            got = model(ids[:, 20:21], **cache_argument(cache)).logits
            expected = teacher_forced_logits(model, ids[:, :21], prompt=20)[:, -1:]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"budget": 20}, {"budget": 0}, {"page_size": 0}])
def test_budgets_are_whole_pages(settings):
    with pytest.raises(ValueError, match="page_size must divide the budget"):
        Quest(**settings)
