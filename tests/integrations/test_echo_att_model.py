"""Students with shared attention maps as ordinary transformers models."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from attention_hosts import FAMILIES, decoder, padded
from cenote.attention import EchoAtt
from cenote.attention.echo_att_cache import ValueLayer
from cenote.attention.host import cache_argument
from cenote.inspection.attention_similarity import removed_by_sharing
from cenote.integrations.echo_att_model import EchoAttLlamaForCausalLM, share_attention
from cenote.integrations.echo_att_model_config import EchoAttLlamaConfig

FORMS = ("probabilities", "query_key")


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_recipe_does_with_fewer_weights(family):
    dense = decoder(family).double()
    ids, mask = padded((9, 14, 1))
    real = mask.bool()
    with EchoAtt(shared_layers=(2, 3))(dense):
        wanted = logits(dense, ids, attention_mask=mask)
    for form in FORMS:
        student = share_attention(dense, (2, 3), shared_form=form)
        found = logits(student, ids, attention_mask=mask)
        torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-6)
        assert dense.num_parameters() - student.num_parameters() == removed_by_sharing(dense, 2)
    assert logits(share_attention(dense, ()), ids, attention_mask=mask).equal(logits(dense, ids, attention_mask=mask))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_both_implementations(implementation):
    dense = decoder("llama").double()
    ids, mask = padded((9, 14))
    wanted = logits(share_attention(dense, (1, 3)), ids, attention_mask=mask)[mask.bool()]
    student = share_attention(dense, (1, 3))
    student.set_attn_implementation(implementation)
    found = student(ids, attention_mask=mask, output_attentions=implementation == "eager", output_hidden_states=True)
    torch.testing.assert_close(found.logits[mask.bool()], wanted)
    assert len(found.hidden_states) == 5
    if implementation == "eager":
        assert torch.equal(found.attentions[1], found.attentions[0])
        assert not torch.equal(found.attentions[2], found.attentions[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"cache_implementation": "static"}]
)
def test_cached_generation_is_full_recomputation(form, how):
    student = share_attention(decoder("llama"), (2, 3), shared_form=form)
    ids, mask = padded((9, 14, 2))
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, **how}
    torch.manual_seed(1)
    cached = student.generate(ids, **settings)
    settings.pop("cache_implementation", None)
    torch.manual_seed(1)
    assert torch.equal(cached, student.generate(ids, **settings, use_cache=False))


def test_shared_layers_hold_values_only():
    student = share_attention(decoder("llama"), (1, 3))
    ids, _ = padded((9, 9))
    cache = DynamicCache(config=student.config)
    parts = [logits(student, part, **cache_argument(cache)) for part in ids.split((5, 3, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(student, ids), rtol=1e-4, atol=1e-5)
    assert [isinstance(layer, ValueLayer) for layer in cache.layers] == [False, True, False, True]
    assert all(layer.get_seq_length() == 9 for layer in cache.layers)
    assert cache.layers[1].keys.numel() == 0
    cache.crop(-4)
    again = logits(student, ids[:, 5:], **cache_argument(cache))
    torch.testing.assert_close(again, torch.cat(parts[1:], 1), rtol=1e-4, atol=1e-5)


def test_windows_are_served_where_source_and_follower_have_the_same():
    dense = decoder("mistral", sliding_window=4).double()
    ids, mask = padded((9, 14))
    found = [logits(share_attention(dense, (2,), shared_form=form), ids, attention_mask=mask) for form in FORMS]
    torch.testing.assert_close(found[0][mask.bool()], found[1][mask.bool()], rtol=0, atol=1e-6)
    student = share_attention(dense, (2,))
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(student.generate(ids, **settings), student.generate(ids, **settings, use_cache=False))
    with pytest.raises(ValueError, match="cannot share with"):
        share_attention(decoder("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2), (2,))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_comes_back_by_the_auto_classes(family, tmp_path):
    student = share_attention(decoder(family), (1, 2), shared_form="query_key")
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(student)
    assert (loaded.config.shared_layers, loaded.config.shared_form) == ([1, 2], "query_key")
    ids, _ = padded((9,))
    assert torch.equal(logits(loaded, ids), logits(student, ids))
    assert type(AutoModel.from_pretrained(tmp_path)) is type(student.model)


def test_a_dense_checkpoint_loses_exactly_the_keys_of_shared_layers(tmp_path):
    dense = decoder("llama")
    dense.save_pretrained(tmp_path / "dense")
    config = EchoAttLlamaConfig.from_pretrained(tmp_path / "dense", shared_layers=[2])
    student, report = EchoAttLlamaForCausalLM.from_pretrained(
        tmp_path / "dense", config=config, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids, _ = padded((9,))
    assert torch.equal(logits(student, ids), logits(share_attention(dense, [2]), ids))
    dense.model.layers[1].self_attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.extra"):
        share_attention(dense, [2])
    dense.save_pretrained(tmp_path / "more")
    _, report = EchoAttLlamaForCausalLM.from_pretrained(tmp_path / "more", config=config, output_loading_info=True)
    assert len(report["unexpected_keys"]) == 2


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_the_source_through_its_followers(form):
    student = share_attention(decoder("llama"), (2, 3), shared_form=form).requires_grad_()
    source = student.model.layers[1].self_attn
    ids, _ = padded((9,))
    full = torch.autograd.grad(student(ids).logits.square().sum(), source.q_proj.weight)[0]
    source.o_proj.weight.requires_grad_(False).zero_()  # the source's own output is gone: only followers remain
    through = torch.autograd.grad(student(ids).logits.square().sum(), source.q_proj.weight)[0]
    assert full.abs().max() > 0
    assert through.abs().max() > 0


@pytest.mark.parametrize("form", FORMS)
def test_checkpointed_layers_have_the_same_gradients(form):
    student = share_attention(decoder("llama"), (2, 3), shared_form=form).requires_grad_().train()
    ids, _ = padded((9,))
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        student.zero_grad()
        student(ids, labels=ids).loss.backward()
        grads.append([parameter.grad.clone() for parameter in student.parameters()])
    torch.testing.assert_close(grads[1], grads[0])
    with pytest.raises(ValueError, match="use_reentrant=False"):
        student.gradient_checkpointing_enable({"use_reentrant": True})


def test_dropout_is_handed_on_or_drawn_afresh():
    dense = decoder("llama", attention_dropout=0.5)
    ids, _ = padded((12,))
    for fresh in (False, True):
        student = share_attention(dense, (1,), fresh_dropout=fresh)
        student.set_attn_implementation("eager")
        maps = student.train()(ids, output_attentions=True).attentions
        same = torch.equal(maps[0] == 0, maps[1] == 0)
        assert same is not fresh
        quiet = student.eval()(ids, output_attentions=True).attentions
        assert torch.equal(quiet[0], quiet[1])
    with pytest.raises(ValueError, match="fresh_dropout=True"):
        share_attention(dense, (1,), shared_form="query_key")


def test_bfloat16_stays_near_float32():
    dense = decoder("llama")
    ids, mask = padded((9, 14))
    wanted = logits(share_attention(dense, (2, 3)), ids, attention_mask=mask)
    narrow = share_attention(dense.to(torch.bfloat16), (2, 3))
    assert narrow.dtype == torch.bfloat16
    found = logits(narrow, ids, attention_mask=mask).float()
    assert (found - wanted)[mask.bool()].abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("layers", [(0,), (4,), (1, 1)])
def test_layers_that_cannot_share_are_refused(layers):
    with pytest.raises(ValueError, match="1 to 3"):
        share_attention(decoder("llama"), layers)


def test_other_bad_input_is_refused():
    dense = decoder("llama")
    with pytest.raises(ValueError, match="expected a causal language model"):
        share_attention(dense.model, (1,))
    with pytest.raises(ValueError, match="shared_form"):
        share_attention(dense, (1,), shared_form="maps")
    student = share_attention(dense, (1,))
    student.config._attn_implementation_internal = "flash_attention_2"
    student.model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="makes no attention maps"):
        student(padded((5,))[0])
