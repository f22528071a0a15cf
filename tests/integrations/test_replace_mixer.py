"""Mixers in the attention's place of real host classes, built small from their configurations."""

import copy
import pickle

import pytest
import timm
import torch
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    StaticCache,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from cenote.integrations.replace_mixer import HostedMixer, replace_mixer
from cenote.mixing import MixerContext
from cenote.mixing.softmax_attention import SoftmaxAttention
from cenote.types import Grid

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
DECODERS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(2, 9, dtype=torch.long)
LEFT[1, :4] = 0
ROPE = "softmax_attention(num_heads=4, rope_theta=10000.0, qkv_bias=True)"


def decoder(kind="llama", **changes):
    torch.manual_seed(0)
    config, model = DECODERS[kind]
    return model(config(**{**SIZES, **changes})).eval()


def from_old(layer, old):
    """Softmax attention with the host's own weights: the host must not notice."""
    new = SoftmaxAttention(old.q_proj.in_features, 4, causal=True, qkv_bias=True, rope_theta=10000.0)
    with torch.no_grad():
        projections = (old.q_proj, old.k_proj, old.v_proj)
        new.qkv.weight.copy_(torch.cat([p.weight for p in projections]))
        new.qkv.bias.copy_(torch.cat([torch.zeros(32) if p.bias is None else p.bias for p in projections]))
        new.proj.weight.copy_(old.o_proj.weight)
        new.proj.bias.zero_()
    return new


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_with_the_old_weights_gives_the_old_logits(kind, attention):
    model = decoder(kind, attn_implementation=attention)
    right = LEFT.flip(1)
    expected = {name: model(ids, attention_mask=mask).logits for name, mask in (("none", None), ("right", right))}
    with replace_mixer(model, from_old, [0, 2]) as replaced:
        assert sorted(replaced.mixers) == [0, 2]
        torch.testing.assert_close(model(ids).logits, expected["none"])
        padded = model(ids, attention_mask=right).logits
        torch.testing.assert_close(padded[right.bool()], expected["right"][right.bool()])
    assert torch.equal(model(ids).logits, expected["none"])
    assert not any(isinstance(module, HostedMixer) for module in model.modules())


@torch.no_grad()
def test_generation_with_left_padding_equals_the_host():
    model = decoder("qwen2")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        expected = model.generate(ids, attention_mask=LEFT, num_beams=beams, **settings)
        with replace_mixer(model, from_old, [0, 2]):
            assert torch.equal(model.generate(ids, attention_mask=LEFT, num_beams=beams, **settings), expected)


@torch.no_grad()
def test_cached_decoding_equals_the_whole_sequence():
    model = decoder()
    with replace_mixer(model, f"identity, {ROPE}", options={"num_heads": 4}):
        whole = model(ids).logits
        cache, parts = DynamicCache(config=model.config), []
        for part in ids.split([4, 1, 1, 3], dim=1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
        assert cache.get_seq_length() == 9


COMMON = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
WINDOWS = {"sliding_window": 4, "head_dim": 8}
HOSTS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **WINDOWS)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, **WINDOWS, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_kv_heads=2,
                     new_decoder_architecture=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("layers", [None, [0], [1]])
@pytest.mark.parametrize("kind", HOSTS)
@torch.no_grad()
def test_left_padding_and_cached_decoding_in_hosts_of_other_makes(kind, layers):
    torch.manual_seed(0)
    model = HOSTS[kind]().eval()
    replace_mixer(model, "gated_delta(num_heads=4)", layers)
    positions = {} if kind == "falcon" else {"position_ids": (LEFT.cumsum(1) - 1).clamp(min=0)}
    padded = model(ids, attention_mask=LEFT, use_cache=False, **positions).logits
    alone = model(ids[1:, 4:], use_cache=False).logits
    torch.testing.assert_close(padded[1:, 4:], alone, rtol=1e-4, atol=1e-5)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(
        ids, attention_mask=LEFT, output_logits=True, return_dict_in_generate=True, use_cache=True, **settings
    )
    mask = torch.nn.functional.pad(LEFT, (0, 5), value=1)
    positions = {} if kind == "falcon" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    whole = model(made.sequences, attention_mask=mask, use_cache=False, **positions).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(made.logits, dim=1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_decoder_behind_an_encoder_has_its_own_places_in_the_cache():
    torch.manual_seed(0)
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    model = BartModel(BartConfig(vocab_size=40, d_model=32, **sizes)).eval()
    replaced = replace_mixer(model, "softmax_attention(num_heads=4)")
    assert [mixer.causal for mixer in replaced.mixers.values()] == [False, False, True, True]
    whole = model(ids, decoder_input_ids=ids, use_cache=False).last_hidden_state
    first = model(ids, decoder_input_ids=ids[:, :6], use_cache=True)
    rest = model(ids, decoder_input_ids=ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    both = torch.cat([first.last_hidden_state, rest.last_hidden_state], dim=1)
    torch.testing.assert_close(both, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_host_keeps_its_own_embeddings(copied):
    model = decoder()
    replace_mixer(model, "static_attention(num_heads=4)", [1])
    model(ids, labels=ids).loss.backward()
    other = copied(model)
    short = ids[:1, :5]
    with torch.no_grad():
        expected = model(short, use_cache=False).logits
        model(ids, use_cache=False)
        torch.testing.assert_close(other(short, use_cache=False).logits, expected)


@torch.no_grad()
def test_masks_of_shifted_windows_are_refused():
    torch.manual_seed(0)
    theirs = SwinModel(SwinConfig(image_size=64, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4))
    ours = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2,), embed_dim=24)
    for model in (theirs.eval(), ours.eval()):
        replace_mixer(model, "softmax_attention(num_heads=4)")
        with pytest.raises(ValueError, match="cannot read padding from an attention mask of shape"):
            model(torch.randn(2, 3, 64, 64))


def test_a_replaced_layer_is_replaced_again_with_the_manners_of_the_first():
    model = decoder()
    first = replace_mixer(model, ROPE, [0])
    assert replace_mixer(model, ROPE, [0]).mixers[0].causal
    with pytest.raises(ValueError, match="sees later tokens"):
        replace_mixer(model, lambda layer, old: SoftmaxAttention(32, 4), [0])
    first.restore()
    assert not any(isinstance(module, HostedMixer) for module in model.modules())
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=48, num_heads=3)
    for _ in range(2):
        replace_mixer(vit, "identity")
    assert vit(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_a_cache_of_fixed_length_is_refused():
    model = decoder()
    with replace_mixer(model, ROPE), pytest.raises(ValueError, match="fresh DynamicCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16), use_cache=True)


def test_only_the_new_mixers_train_when_asked():
    model = decoder()
    replaced = replace_mixer(model, ROPE, [-1])
    model.requires_grad_(False)
    for parameter in replaced.parameters():
        parameter.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    graded = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded == {
        f"model.layers.2.self_attn.mixer.{n}" for n in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    }
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.grad is not None)


def test_qwen3_and_bert_and_vit_run_and_padding_does_not_matter():
    torch.manual_seed(0)
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)).eval()
    bert = BertModel(
        BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ).eval()
    for model, get in ((qwen3, lambda o: o.logits), (bert, lambda o: o.last_hidden_state)):
        replace_mixer(model, "softmax_attention(num_heads=4)", [1])
        mask = torch.ones(1, 9, dtype=torch.long)
        mask[0, 6:] = 0
        with torch.no_grad():
            short, long = get(model(ids[:1, :6])), get(model(ids[:1], attention_mask=mask))
        torch.testing.assert_close(long[:, :6], short, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_grids_come_from_the_host():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vit = ViTModel(ViTConfig(image_size=32, patch_size=8, **size)).eval()
    deit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    siglip = SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=8, **size)).eval()
    with replace_mixer(siglip, "pool") as replaced:
        assert (replaced.context.grid, replaced.context.prefix) == (Grid(4, 4), 0)
        assert siglip(images).last_hidden_state.shape == (2, 16, 32)
    for model in (vit, deit):
        before = model(images)
        with replace_mixer(model, "softmax_attention(num_heads=4)", [0]) as replaced:
            assert replaced.context.grid == Grid(4, 4)
            assert replaced.context.prefix == 1
            changed = model(images)
        restored = model(images)
        pick = (lambda o: o.last_hidden_state) if model is vit else (lambda o: o)
        assert torch.equal(pick(restored), pick(before))
        assert (pick(changed) - pick(before)).abs().max() > 1e-3


def test_what_does_not_fit_is_refused_and_nothing_changes():
    model = decoder()
    with pytest.raises(ValueError, match="layers 0 to 2"):
        replace_mixer(model, ROPE, [3])
    with pytest.raises(ValueError, match="replaced once"):
        replace_mixer(model, ROPE, [0, -3])
    with pytest.raises(ValueError, match="unknown mixer"):
        replace_mixer(model, "identity, nonsense")
    with pytest.raises(ValueError, match="sees later tokens"):
        replace_mixer(model, lambda layer, old: SoftmaxAttention(32, 4))
    with pytest.raises(ValueError, match="no blocks with self-attention"):
        replace_mixer(torch.nn.Linear(2, 2), ROPE)
    assert not any(isinstance(module, HostedMixer) for module in model.modules())


def test_a_context_of_the_callers_is_used():
    model = decoder()
    replaced = replace_mixer(model, ROPE, [0], context=MixerContext(positions=torch.arange(9).expand(2, 9) * 2))
    doubled = model(ids).logits
    replaced.context = MixerContext()
    assert (model(ids).logits - doubled).abs().max() > 1e-5
