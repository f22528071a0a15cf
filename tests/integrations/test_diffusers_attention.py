"""Rectified SpaAttn in the transformers of diffusers: small random hosts of every class that it serves."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from cenote.attention import Recipe, RectifiedSpaAttn
from diffusers_hosts import HOSTS, flux, flux_inputs, hunyuan, hunyuan_inputs, wan, wan_inputs

SPARSE = {"block_size": 8, "top_k": 2, "p": 1e-3, "neighbours": False, "first_frame": False}


@torch.no_grad()
def run(model, inputs):
    return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize(
    "settings", [{"p": 1.0}, {"p": 1.0, "order": "raster"}, {"top_k": 99, "axis_order": ("t", "h", "w")}]
)
def test_the_dense_limit_is_the_model_itself(name, settings):
    build, inputs = HOSTS[name]
    model, x = build(), inputs()
    expected = run(model, x)
    with RectifiedSpaAttn(block_size=16, **settings)(model) as session:
        torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-5)
    assert session.density == 1


@pytest.mark.parametrize("name", HOSTS)
def test_sparse_attention_changes_the_output_and_leaves_the_model_alone(name):
    build, inputs = HOSTS[name]
    model, x = build(), inputs()
    before = {key: value.clone() for key, value in x.items() if isinstance(value, torch.Tensor)}
    expected, processors = run(model, x), model.attn_processors
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    with RectifiedSpaAttn(**SPARSE)(model) as session:
        sparse = run(model, x)
        assert model.attn_processors != processors
    assert sparse.isfinite().all()
    assert (sparse - expected).abs().max() > 1e-2
    assert session.density < 0.6
    assert all(torch.equal(x[key], value) for key, value in before.items())
    assert model.attn_processors == processors
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()] == hooks
    assert torch.equal(run(model, x), expected)


@pytest.mark.parametrize("name", HOSTS)
def test_dense_layers_and_calls_run_the_host_in_the_order_of_the_curve(name):
    build, inputs = HOSTS[name]
    model, x = build(), inputs()
    expected = run(model, x)
    for settings in ({"dense_layers": tuple(range(9))}, {"dense_calls": 1}):
        with RectifiedSpaAttn(**SPARSE | settings)(model):
            torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_every_item_is_as_it_is_alone(name):
    build, inputs = HOSTS[name]
    model, x = build(), inputs()
    per_item = {key for key in x if key not in ("img_ids", "txt_ids", "image_rotary_emb")}
    with RectifiedSpaAttn(**SPARSE)(model):
        together = run(model, x)
        for item in range(2):
            alone = run(model, {key: value[item : item + 1] if key in per_item else value for key, value in x.items()})
            torch.testing.assert_close(together[item], alone[0], rtol=1e-4, atol=1e-5)


def test_padded_text_is_as_if_it_were_cut_off():
    model, x = hunyuan(), hunyuan_inputs()
    with RectifiedSpaAttn(**SPARSE)(model):
        together = run(model, x)
        text = ("encoder_hidden_states", "encoder_attention_mask")
        alone = run(model, {key: value[1:, :3] if key in text else value[1:] for key, value in x.items()})
        torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-5)
        x["encoder_hidden_states"][1, 3:] = 50.0
        torch.testing.assert_close(run(model, x)[1], alone[0], rtol=1e-4, atol=1e-5)


def test_the_first_calls_of_every_generation_are_dense():
    model, x = wan(), wan_inputs()

    def dense(timestep):
        x["timestep"] = torch.full((2,), timestep)
        return torch.equal(run(model, x), plain[timestep])

    plain = {}
    with RectifiedSpaAttn(block_size=8, dense_layers=(0, 1, 2), order="raster")(model):
        for timestep in (900, 600, 300):
            x["timestep"] = torch.full((2,), timestep)
            plain[timestep] = run(model, x)
    with RectifiedSpaAttn(**SPARSE, order="raster", dense_calls=3)(model):
        assert [dense(t) for t in (900, 900, 600, 600, 300, 300)] == [True, True, True, False, False, False]
        assert [dense(t) for t in (900, 900, 600, 600)] == [True, True, True, False]


def test_only_the_layers_named_are_dense():
    model, x = wan(), wan_inputs()
    seen = []
    for number, block in enumerate(model.blocks):
        block.attn1.to_out[0].register_forward_hook(lambda m, a, out, n=number: seen.append((n, out)))
    with torch.no_grad():
        for settings in ({"dense_layers": (0, 1, 2)}, {"dense_layers": (0, 2)}):
            with RectifiedSpaAttn(**SPARSE | settings)(model):
                run(model, x)
    pairs = {n: [out for number, out in seen if number == n] for n in range(3)}
    assert torch.equal(*pairs[0])
    assert not torch.allclose(*pairs[1], atol=1e-3)


def test_a_time_for_every_token_follows_the_tokens():
    model, x = wan(), wan_inputs()
    x["timestep"] = torch.rand(2, 3 * 4 * 6).mul(900)
    expected = run(model, x)
    with RectifiedSpaAttn(block_size=16, p=1.0)(model):
        torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [wan, flux])
def test_fused_projections(build):
    model, x = build(), (wan_inputs if build is wan else flux_inputs)()
    expected = run(model, x)
    model.fuse_qkv_projections()
    with RectifiedSpaAttn(block_size=16, p=1.0)(model):
        torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_and_checkpointing():
    model, x = wan().to(torch.bfloat16), wan_inputs()
    x = {key: value.bfloat16() if value.is_floating_point() else value for key, value in x.items()}
    expected = run(model, x)
    with RectifiedSpaAttn(block_size=16, p=1.0)(model):
        torch.testing.assert_close(run(model, x), expected, rtol=0.05, atol=0.05)
    model, x = wan(), wan_inputs()
    model.train().enable_gradient_checkpointing()
    with RectifiedSpaAttn(**SPARSE)(model):
        model(**x).sample.square().mean().backward()
    grads = [p.grad.clone() for p in model.blocks.parameters() if p.grad is not None]
    model.zero_grad()
    model.disable_gradient_checkpointing()
    with RectifiedSpaAttn(**SPARSE)(model):
        model(**x).sample.square().mean().backward()
    again = [p.grad for p in model.blocks.parameters() if p.grad is not None]
    assert len(grads) > 10
    for one, other in zip(grads, again, strict=True):
        torch.testing.assert_close(one, other)


def test_the_model_is_restored_after_an_exception():
    model, x = hunyuan(), hunyuan_inputs()
    expected, processors = run(model, x), model.attn_processors
    with pytest.raises(RuntimeError, match="stop"), RectifiedSpaAttn(**SPARSE)(model):
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="multiple of block_size = 24"), RectifiedSpaAttn(block_size=24)(model):
        run(model, x)
    assert model.attn_processors == processors
    assert torch.equal(run(model, x), expected)
    with RectifiedSpaAttn(block_size=24, p=1.0, allow_padding=True)(model):
        torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_served_is_refused_by_name():
    recipe = RectifiedSpaAttn(**SPARSE)
    with (
        pytest.raises(
            TypeError, match=r"WanTransformer3DModel of diffusers or a VisionTransformer of timm, got Linear"
        ),
        recipe(nn.Linear(2, 2)),
    ):
        pass
    model = wan()
    with recipe(model), pytest.raises(ValueError, match="must use WanAttnProcessor"), recipe(model):
        pass
    model = hunyuan(image_condition_type="token_replace")
    with recipe(model), pytest.raises(ValueError, match="token_replace"):
        run(model, hunyuan_inputs())
    with RectifiedSpaAttn(**SPARSE, order="raster")(model):
        assert run(model, hunyuan_inputs()).isfinite().all()
    model, x = flux(), flux_inputs()
    with recipe(model):
        with pytest.raises(ValueError, match="controlnet_block_samples come in raster order"):
            run(model, {**x, "controlnet_block_samples": [torch.zeros(2, 48, 24)] * 2})
        with pytest.raises(ValueError, match="one image in raster order"):
            run(model, {**x, "img_ids": x["img_ids"].flip(0)})


def test_settings_are_saved_and_presets_are_those_of_the_paper(tmp_path):
    recipe = RectifiedSpaAttn.preset("wan2.1_t2v", axis_order=("t", "w", "h"), block_size=64)
    assert (recipe.dense_layers, recipe.dense_calls, recipe.drop_rate) == ((0, 1), 10, 0.75)
    recipe.save_pretrained(tmp_path)
    assert RectifiedSpaAttn.from_pretrained(tmp_path) == recipe
    assert Recipe.from_pretrained(tmp_path) == recipe
    with pytest.raises(ValueError, match=r"unknown preset 'wan'"):
        RectifiedSpaAttn.preset("wan")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_rate": 1.0}, "drop_rate"),
        ({"p": 0.0}, "p must lie"),
        ({"top_k": 0}, "top_k"),
        ({"block_size": 0}, "block_size"),
        ({"order": "snake"}, "order"),
        ({"axis_order": ("w", "h", "h")}, "axis_order"),
        ({"mean": "max"}, "mean"),
        ({"compensate": "some"}, "compensate"),
        ({"dense_calls": -1}, "negative"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RectifiedSpaAttn(**settings)


def test_decoders_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with (
        pytest.raises(TypeError, match="got LlamaForCausalLM"),
        RectifiedSpaAttn()(transformers.LlamaForCausalLM(config)),
    ):
        pass
