import pytest
import torch

from attention_hosts import decoder, padded
from cenote.attention import Window
from cenote.compress.teacher_forced import teacher_forced_logits
from reference.masked_decoding import masked_decoding


def rule(budget, sinks):
    def kept(layer, call, logits, seen):
        real = seen[:, :1, -1].cumsum(-1).unsqueeze(2)  # of every key, counted from 1
        own = real[..., call.mask.offset : call.mask.offset + logits.shape[2]].transpose(-1, -2)
        return (real <= sinks) | (real > own - (budget - sinks))

    return kept


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_it_equals_masked_dense_attention(family, prefill):
    model = decoder(family)
    ids, mask = padded((40, 23, 9))
    with masked_decoding(model, rule(8, 3), prefill):
        expected = teacher_forced_logits(model, ids, mask.bool(), prompt=33)
    with Window(budget=8, sinks=3, prefill=prefill)(model):
        got = teacher_forced_logits(model, ids, mask.bool(), prompt=33)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert float((expected - teacher_forced_logits(model, ids, mask.bool(), prompt=33)).abs().max()) > 1e-2


def test_a_long_prompt_goes_in_stretches(monkeypatch):
    monkeypatch.setattr("cenote.attention.window.CHUNK", 7)
    model = decoder()
    ids, mask = padded((40, 31))
    with masked_decoding(model, rule(6, 2), True):
        expected = teacher_forced_logits(model, ids, mask.bool(), prompt=38)
    with Window(budget=6, sinks=2, prefill=True)(model):
        torch.testing.assert_close(
            teacher_forced_logits(model, ids, mask.bool(), prompt=38), expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("settings", [{"budget": 4}, {"budget": 0, "sinks": 0}, {"sinks": -1}])
def test_settings_that_leave_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="sinks"):
        Window(**settings)


def test_windows_of_the_host_can_be_left_alone():
    model = decoder("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="sliding window of 8"), Window()(model):
        pass
    with Window(dense_layers=(0, 1, 2, 3))(model):
        pass
