import pytest
import torch
from transformers import DynamicCache

from attention_hosts import decoder, padded
from cenote.attention import H2O
from cenote.attention.host import cache_argument
from cenote.compress.cost import cache_bytes
from cenote.compress.teacher_forced import teacher_forced_logits
from reference.masked_decoding import masked_decoding

BUDGET, RECENT = 9, 4


class Rule:
    """The same on a full cache: dropped keys are masked instead of removed."""

    def __init__(self):
        self.kept, self.scores = {}, {}

    def __call__(self, layer, call, logits, seen):
        kv_heads, (batch, heads, _, keys) = call.key.shape[1], logits.shape
        before = self.kept.get(layer, torch.ones(batch, kv_heads, 0, dtype=torch.bool))
        new = torch.ones(batch, kv_heads, keys - before.shape[2], dtype=torch.bool)
        kept = torch.cat((before, new), dim=2)
        alive = seen & kept.repeat_interleave(heads // kv_heads, dim=1).unsqueeze(2)
        weights = logits.masked_fill(~alive, -1e30).softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
        scores = torch.zeros(batch, kv_heads, keys)
        if layer in self.scores:
            scores[..., : self.scores[layer].shape[2]] = self.scores[layer]
        scores += weights.sum(2).unflatten(1, (kv_heads, -1)).sum(2)
        left = kept.clone()
        for row in range(batch):
            real = seen[row, 0, -1]
            for head in range(kv_heads):
                held = (kept[row, head] & real).nonzero().flatten()
                newest = real.nonzero().flatten()[-RECENT:]
                priority = scores[row, head].clone()
                priority[newest] = float("inf")
                if len(held) > BUDGET:
                    stay = held[priority[held].topk(BUDGET).indices]
                    left[row, head] = False
                    left[row, head, stay] = True
        self.kept[layer], self.scores[layer] = left, scores
        return alive


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("prompt", [20, 35])
def test_it_equals_a_full_cache_with_the_dropped_keys_masked(family, prompt):
    model = decoder(family)
    ids, mask = padded((43, 30, 25))
    with masked_decoding(model, Rule()):
        expected = teacher_forced_logits(model, ids, mask.bool(), prompt=prompt)
    with H2O(budget=BUDGET, recent=RECENT)(model):
        got = teacher_forced_logits(model, ids, mask.bool(), prompt=prompt)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert float((expected - teacher_forced_logits(model, ids, mask.bool(), prompt=prompt)).abs().max()) > 1e-2


def test_entries_are_really_removed_and_lengths_stay_those_of_the_text():
    model = decoder()
    ids, _ = padded((30,))
    with torch.no_grad(), H2O(budget=8)(model):
        cache = DynamicCache(config=model.config)
        for new in (slice(0, 20), slice(20, 21), slice(21, 26)):
            model(ids[:, new], **cache_argument(cache))
            assert cache.get_seq_length() == new.stop
            for layer in cache.layers:
                assert layer.keys.shape == layer.values.shape == (1, 2, 8, 8)
                assert layer.state.places.shape == layer.state.scores.shape == (1, 2, 8)
                newest = set(range(new.stop - 4, new.stop))
                assert all(newest <= set(places.tolist()) for places in layer.state.places[0])
    assert cache_bytes(cache) == 4 * (2 * 2 * 8 * 8 * 4 + 2 * 8 * (8 + 4))


def test_a_continuation_of_several_tokens_equals_single_steps_while_nothing_is_dropped():
    model = decoder()
    ids, _ = padded((30,))
    with torch.no_grad(), H2O(budget=64)(model):
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], **cache_argument(cache))
        got = model(ids[:, 20:26], **cache_argument(cache)).logits
        expected = teacher_forced_logits(model, ids[:, :26], prompt=20)[:, 1:]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_newest_tokens_can_be_taken_back():
    model = decoder()
    ids, _ = padded((30,))
    with torch.no_grad(), H2O(budget=64)(model):
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], **cache_argument(cache))
        for token in (25, 26):
            model(ids[:, token : token + 1], **cache_argument(cache))
        cache.crop(-2)
        assert cache.get_seq_length() == 20
        got = model(ids[:, 20:21], **cache_argument(cache)).logits
        expected = teacher_forced_logits(model, ids[:, :21], prompt=20)[:, -1:]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_what_is_dropped_cannot_be_taken_back():
    model = decoder()
    ids, _ = padded((60,))
    with torch.no_grad(), H2O(budget=8, recent=1)(model):
        cache = DynamicCache(config=model.config)
        model(ids, **cache_argument(cache))
        with pytest.raises(ValueError, match="dropped"):
            cache.crop(-20)


def test_bad_input():
    for settings in ({"budget": 1}, {"budget": 8, "recent": 0}, {"budget": 8, "recent": 9}):
        with pytest.raises(ValueError, match="recent <= budget"):
            H2O(**settings)
    model = decoder()
    ids, _ = padded((10,))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, **cache_argument(cache))
        with H2O()(model), pytest.raises(ValueError, match="holds nothing yet"):
            model(ids[:, :1], **cache_argument(cache))
