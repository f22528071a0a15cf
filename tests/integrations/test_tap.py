"""TAP and the capture of attention inside timm, transformers and this library's own models."""

import pytest
import timm
import torch
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.masking_utils import flash_attention_mask

from cenote.backbones.tiny_vit import TinyViT, TinyViTConfig
from cenote.integrations.attention_capture import AttentionCapture
from cenote.integrations.tap import InsertedPooling
from cenote.mixing.softmax_attention import SoftmaxAttention
from cenote.mixing.tap import TokenAwarePooling
from cenote.ops.attention_diversity import QueryKey, attention_diversification_loss, head_mean_map

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}


def timm_vit(**settings):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    return timm.models.VisionTransformer(**{**options, **settings}).eval()


def hf_vit():
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=5, **SMALL)).eval()


def logits(model, images):
    output = model(images)
    return getattr(output, "logits", getattr(output, "last_hidden_state", output))


HOSTS = {
    "timm vit": (timm_vit, 1, (4, 4)),
    "timm vit with registers": (lambda: timm_vit(reg_tokens=3, qk_norm=True, init_values=0.1), 4, (4, 4)),
    "timm vit on a wide grid": (lambda: timm_vit(img_size=(32, 48)), 1, (4, 6)),
    "transformers vit": (hf_vit, 1, (4, 4)),
    "transformers dinov2": (
        lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(image_size=32, patch_size=8, num_register_tokens=2, **SMALL)
        ).eval(),
        3,
        (4, 4),
    ),
    "transformers clip": (
        lambda: CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **SMALL)).eval(),
        1,
        (4, 4),
    ),
    "tiny vit": (lambda: TinyViT(TinyViTConfig(32, 8, 3, 24, 3, 3, mean=(0.5,) * 3, std=(0.5,) * 3)).eval(), 1, (4, 4)),
}


@pytest.mark.parametrize("host", HOSTS)
def test_poolings_stand_before_the_norm_and_leave_without_trace(host):
    make, prefix, grid = HOSTS[host]
    model = make()
    images = torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    plain, before = logits(model, images), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        inserted = InsertedPooling(model, 3)
        assert (inserted.prefix, inserted.grid) == (prefix, grid)
        assert len(inserted.poolings) == 3
        assert sum("dilation_predictor.proj.0.weight" in key for key in model.state_dict()) == 3
        assert not torch.allclose(logits(model, images), plain, atol=1e-4)
        for tap in inserted.poolings:  # shares that always choose the token itself
            tap.proj[1].weight.zero_()
            tap.proj[1].bias.fill_(1)
            tap.proj[2].weight.zero_()[0, :, 1, 1] = 1e4
        torch.testing.assert_close(logits(model, images), plain)
        inserted.remove()
    assert torch.equal(logits(model, images), plain)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    inserted = InsertedPooling(model, 2, layers=[0, -1])
    assert len(inserted.poolings) == 2
    with pytest.raises(ZeroDivisionError), inserted:
        raise ZeroDivisionError
    assert torch.equal(logits(model, images), plain)
    assert model.state_dict().keys() == before.keys()


def test_one_scale_is_the_host_to_the_bit_and_published_keys_load():
    model, images = timm_vit(), torch.randn(2, 3, 32, 32)
    plain = model(images)
    with InsertedPooling(model, 1):
        assert torch.equal(model(images), plain)
    published = TokenAwarePooling(24, 4).state_dict()
    with InsertedPooling(model, 4) as inserted:
        missing = model.load_state_dict(
            {f"blocks.1.dilation_predictor.{k}": v for k, v in published.items()}, strict=False
        )
        assert not missing.unexpected_keys
        assert torch.equal(inserted.poolings[1].proj[0].weight, published["proj.0.weight"])


def test_a_block_does_what_the_paper_says():
    model = timm_vit(class_token=False, global_pool="avg")
    block, x = model.blocks[0], torch.randn(2, 16, 24)
    with InsertedPooling(model, 4) as inserted:
        tap = inserted.poolings[0]
        mixed = x + block.attn(F.layer_norm(tap(x, (4, 4)), (24,), block.norm1.weight, block.norm1.bias, 1e-6))
        torch.testing.assert_close(block(x), mixed + block.mlp(block.norm2(mixed)))


def test_swin_is_pooled_stage_by_stage_on_its_own_maps():
    model = timm.models.SwinTransformer(
        img_size=64, patch_size=4, embed_dim=12, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=5
    ).eval()
    images = torch.randn(1, 3, 64, 64)
    plain = model(images)
    with InsertedPooling(model, 3) as inserted, torch.no_grad():
        assert [tap.dim for tap in inserted.poolings] == [12, 24]
        assert not torch.allclose(model(images), plain, atol=1e-4)
    assert torch.equal(model(images), plain)
    with AttentionCapture(model, "maps") as seen:
        model(images)
        assert [layer.shape[-1] for layer in seen.layers] == [16, 16]


@pytest.mark.parametrize("host", HOSTS)
def test_captured_queries_and_keys_make_the_maps_the_model_uses(host):
    make, prefix, grid = HOSTS[host]
    model = make()
    images = torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    plain = logits(model, images)
    tokens = prefix + grid[0] * grid[1]
    with AttentionCapture(model) as seen:
        for _ in range(2):  # a second pass begins anew
            assert torch.equal(logits(model, images), plain)
        assert len(seen.layers) == 3
        assert all(isinstance(layer, QueryKey) for layer in seen.layers)
        assert seen.layers[0].query.shape == (2, 3, tokens, 8)
        streamed, similarity = seen.loss(1.1), seen.similarity()
        means = [head_mean_map(layer) for layer in seen.layers]
    assert torch.equal(logits(model, images), plain)
    assert 0 < float(similarity.detach()) <= 1
    if host == "tiny vit":
        with pytest.raises(ValueError, match="keeps no maps"), AttentionCapture(model, "maps"):
            pass
        return
    with AttentionCapture(model, "maps") as seen:
        torch.testing.assert_close(logits(model, images), plain)
        for ours, maps in zip(means, seen.layers, strict=True):
            torch.testing.assert_close(ours, maps.mean(dim=1))
        torch.testing.assert_close(seen.loss(1.1), streamed)
    assert torch.equal(logits(model, images), plain)


def test_the_loss_reaches_the_weights_through_both_ways():
    model, images = timm_vit().double(), torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(60)  # sharp enough for shared sinks
    gradients = []
    for keep in ("query_key", "maps"):
        with AttentionCapture(model, keep) as seen:
            model(images)
            loss = seen.loss()
        assert loss.item() > 0
        model.zero_grad()
        loss.backward()
        gradients.append([block.attn.qkv.weight.grad.clone() for block in model.blocks])
        assert gradients[-1][0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_masks_and_shared_keys_of_a_decoder_are_seen():
    config = LlamaConfig(
        vocab_size=30, num_key_value_heads=1, max_position_embeddings=16, **{**SMALL, "hidden_size": 48}
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(30, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    plain = model(ids, attention_mask=mask).logits
    before = model.config._attn_implementation
    with AttentionCapture(model) as seen:
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)
        assert seen.layers[0].key.shape == (2, 3, 9, 16)
        mean = head_mean_map(seen.layers[0])
    assert model.config._attn_implementation == before
    assert mean[0].triu(1).abs().max() == 0
    assert mean[1, 3:, :3].abs().max() == 0
    with AttentionCapture(model, "maps") as seen:
        model(ids, attention_mask=mask)
        torch.testing.assert_close(seen.layers[0].mean(dim=1)[1, 3:], mean[1, 3:])
        torch.testing.assert_close(seen.layers[0].mean(dim=1)[0], mean[0])


@pytest.mark.parametrize("tokens", [9, 70])
def test_causality_that_the_host_leaves_to_its_kernel_is_seen(tokens):
    """Without padding transformers passes no mask to a fused kernel, which hides later tokens by itself."""
    config = LlamaConfig(vocab_size=30, max_position_embeddings=80, initializer_range=0.3, **SMALL)
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(30, (2, tokens))
    with AttentionCapture(model) as seen:
        model(ids)
        means, streamed = [head_mean_map(layer) for layer in seen.layers], seen.loss(1.1)
    with AttentionCapture(model, "maps") as seen:
        model(ids)
        for ours, maps in zip(means, seen.layers, strict=True):
            torch.testing.assert_close(ours, maps.mean(dim=1))
        torch.testing.assert_close(seen.loss(1.1), streamed)


def test_what_changes_maps_beyond_queries_and_keys_is_refused():
    options = {**SMALL, "head_dim": 8, "num_key_value_heads": 3, "vocab_size": 30, "max_position_embeddings": 16}
    model, ids = Gemma2ForCausalLM(Gemma2Config(**options, attn_implementation="eager")).eval(), torch.ones(1, 5).long()
    with AttentionCapture(model) as seen, pytest.raises(ValueError, match="depend on softcap beside queries"):
        model(ids)
    with AttentionCapture(model, "maps") as seen:
        model(ids)
        assert len(seen.layers) == 3
    # As flash attention takes it: which tokens are real, (batch, tokens), the order left to the kernel.
    AttentionMaskInterface.register("two_axes", flash_attention_mask)
    AttentionInterface.register("two_axes", lambda *args, **kwargs: pytest.fail("never reached"))
    flash = LlamaForCausalLM(LlamaConfig(**options)).eval()
    flash.config._attn_implementation_internal = "two_axes"
    with AttentionCapture(flash), pytest.raises(ValueError, match="depend on a mask in the form of two_axes"):
        flash(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))


def test_positions_that_queries_and_keys_do_not_show_are_refused():
    rotary = timm.models.Eva(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5,
        use_rot_pos_emb=True, use_abs_pos_emb=False,
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match="EvaAttention shows no queries and keys"), AttentionCapture(rotary):
        pass
    with AttentionCapture(rotary, "maps") as seen:
        rotary(torch.randn(1, 3, 32, 32))
    assert [layer.shape for layer in seen.layers] == [(1, 3, 17, 17)] * 2
    for options in ({"rope_theta": 100.0}, {"causal": True}):
        with (
            pytest.raises(ValueError, match="depend on positions"),
            AttentionCapture(SoftmaxAttention(8, 2, **options)),
        ):
            pass
    model = SoftmaxAttention(8, 2)
    x = torch.randn(2, 5, 8)
    with AttentionCapture(model) as seen:
        model(x)
    torch.testing.assert_close(head_mean_map(seen.layers[0]), model(x, return_weights=True)[1].mean(dim=1))


def test_all_is_put_back_after_an_error():
    for model in (timm_vit(), hf_vit()):
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        with pytest.raises(ZeroDivisionError), AttentionCapture(model, "maps"):
            raise ZeroDivisionError
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
        if hasattr(model, "blocks"):
            assert all(block.attn.fused_attn for block in model.blocks)
        else:
            assert model.config._attn_implementation == "sdpa"


def test_bad_input():
    model = timm_vit()
    with pytest.raises(ValueError, match="3 blocks, there is no block 3"):
        InsertedPooling(model, layers=[0, 3])
    with pytest.raises(ValueError, match="no norm in front of its attention called other"):
        InsertedPooling(model, norm="other")
    with pytest.raises(ValueError, match="num_scales of at least 1"):
        InsertedPooling(model, 0)
    assert not any("dilation_predictor" in key for key in model.state_dict())
    with InsertedPooling(model), pytest.raises(ValueError, match="has a pooling already"):
        InsertedPooling(model)
    with InsertedPooling(model, grid=(3, 5)), pytest.raises(ValueError, match="3 x 5"):
        model(torch.randn(1, 3, 32, 32))
    with (
        pytest.raises(ValueError, match="no attention that is known in Linear"),
        AttentionCapture(torch.nn.Linear(2, 2)),
    ):
        pass
    with pytest.raises(ValueError, match="run the model"), AttentionCapture(model) as seen:
        seen.loss()
    with pytest.raises((ValueError, TypeError), match=r"'query_key'.* 'maps'"):
        AttentionCapture(model, "all")
    with pytest.raises(TypeError, match="use the eager path"):
        attention_diversification_loss([None])
