import pytest
import torch
from transformers import DynamicCache

from attention_hosts import decoder, padded
from cenote.compress.teacher_forced import teacher_forced_logits, text_nll


@pytest.mark.parametrize("prompt", [1, 9, 20])
def test_steps_say_what_one_pass_over_the_text_says(prompt):
    model = decoder()
    ids, _ = padded((20, 20))
    whole = model(ids).logits
    steps = teacher_forced_logits(model, ids, prompt=prompt)
    torch.testing.assert_close(steps, whole[:, prompt - 1 :], rtol=1e-4, atol=1e-5)


def test_left_padded_rows_say_what_they_say_alone():
    model = decoder()
    ids, mask = padded((20, 13))
    steps = teacher_forced_logits(model, ids, mask.bool(), prompt=10)
    alone = teacher_forced_logits(model, ids[1:, 7:], prompt=3)
    torch.testing.assert_close(steps[1:], alone, rtol=1e-4, atol=1e-5)


def test_a_filled_cache_is_continued():
    model = decoder()
    ids, mask = padded((20, 13))
    whole = teacher_forced_logits(model, ids, mask.bool(), prompt=12)
    cache = DynamicCache(config=model.config)
    teacher_forced_logits(model, ids[:, :11], mask[:, :11].bool(), prompt=11, cache=cache)
    for _ in range(2):
        again = teacher_forced_logits(model, ids, mask.bool(), prompt=12, cache=cache)
        torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)
        cache.crop(-9)
    with pytest.raises(ValueError, match="holds 11 tokens"):
        teacher_forced_logits(model, ids, mask.bool(), prompt=11, cache=cache)


def test_nll_is_that_of_the_tokens_behind_the_prompt():
    model = decoder()
    ids, _ = padded((12, 12))
    said = model(ids).logits.log_softmax(-1)
    expected = torch.stack([-said[:, i - 1].gather(1, ids[:, i, None])[:, 0] for i in range(5, 12)], dim=1)
    torch.testing.assert_close(text_nll(teacher_forced_logits(model, ids, prompt=5), ids), expected)


def test_prompts_that_do_not_fit_are_refused():
    ids, mask = padded((12, 6))
    for prompt in (0, 13):
        with pytest.raises(ValueError, match="between 1 and 12"):
            teacher_forced_logits(decoder(), ids, prompt=prompt)
    with pytest.raises(ValueError, match="no real token"):
        teacher_forced_logits(decoder(), ids, mask.bool(), prompt=6)
