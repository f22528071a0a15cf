import pytest
import torch
import transformers

from backbones.hosts import VISION, VISION_HOSTS, pictures, save_processor, save_vision
from cenote.backbones import load_backbone
from cenote.types import Grid


@pytest.fixture(scope="module", params=VISION_HOSTS)
def host(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = save_vision(request.param, folder)
    return request.param, model, load_backbone(f"hf:{folder}")


def own_states(name, model, pixels):
    """The model's own hidden states, with its last hidden state in the last place."""
    extra = {"noise": torch.arange(16.0).expand(len(pixels), -1)} if name == "vit_mae" else {}
    if name == "vit_mae":
        model.config.mask_ratio = 0.0
    with torch.inference_mode():
        out = model(pixels, output_hidden_states=True, **extra)
    return [*out.hidden_states[:-1], out.last_hidden_state], getattr(out, "pooler_output", None)


def test_hidden_states_grid_and_prefix(host):
    name, model, backbone = host
    _, _, prefix, pools = VISION_HOSTS[name]
    batch = backbone.collate(pictures(3))
    states, pooled = own_states(name, model, batch["pixel_values"])
    features = backbone(batch, range(4))
    assert len(states) == 4
    assert features.layers == (0, 1, 2, 3)
    for number, state in enumerate(states):
        torch.testing.assert_close(features.hidden[:, number], state, rtol=1e-5, atol=1e-5)
    assert features.grid == backbone.grid == Grid(4, 4)
    assert features.prefix == backbone.prefix == prefix
    assert features.hidden.shape == (3, 4, prefix + 16, 16)
    assert features.mask.all()
    assert (features.pooled is not None) == pools
    if pools:
        torch.testing.assert_close(features.pooled, pooled, rtol=1e-5, atol=1e-5)
        assert backbone.pooled_dim == pooled.shape[-1]


def test_streaming_gives_the_same(host):
    _, _, backbone = host
    batch = backbone.collate(pictures(2))
    whole = backbone(batch, (3, 0, 2))
    streamed = backbone(
        batch, (3, 0, 2), reduce=lambda hidden, mask: (hidden * mask.unsqueeze(-1)).amax(1, keepdim=True)
    )
    torch.testing.assert_close(streamed.hidden, whole.hidden.amax(2, keepdim=True))
    assert streamed.mask.shape == (2, 1)
    assert streamed.prefix == 0
    assert streamed.grid is None


def test_an_item_does_not_depend_on_its_batch(host):
    _, _, backbone = host
    images = pictures(3)
    together = backbone(backbone.collate(images), "all").hidden
    alone = backbone(backbone.collate(images[1:2]), "all").hidden
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_eval_mode_and_no_graph(host):
    _, _, backbone = host
    features = backbone(backbone.collate(pictures(1)))
    assert not backbone.module.training
    assert not features.hidden.requires_grad
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())


@pytest.mark.parametrize(("kind", "prefix"), [("CLIP", 1), ("Siglip", 0)])
def test_the_vision_tower_of_a_two_tower_checkpoint(kind, prefix, tmp_path):
    text = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 10,
    }
    config = getattr(transformers, f"{kind}Config")(vision_config=VISION, text_config=text)
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    save_processor(tmp_path, 16)
    backbone = load_backbone(str(tmp_path))
    batch = backbone.collate(pictures(2))
    features = backbone(batch)
    with torch.inference_mode():
        out = model.vision_model(batch["pixel_values"])
    torch.testing.assert_close(features.hidden[:, 0], out.last_hidden_state)
    torch.testing.assert_close(features.pooled, out.pooler_output)
    assert features.prefix == prefix
    assert features.grid == (4, 4)


def test_variable_resolution_has_a_mask_and_a_grid_where_there_is_one(tmp_path):
    vision = {**{k: v for k, v in VISION.items() if k != "image_size"}, "num_patches": 16}
    text = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 10,
    }
    config = transformers.Siglip2Config(vision_config=vision, text_config={**text, "projection_size": 16})
    transformers.Siglip2Model(config).eval().save_pretrained(tmp_path)
    transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=16).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    wide, square = pictures(1, (32, 8)) + pictures(1, (20, 20))
    mixed = backbone(backbone.collate([wide, square]), "all")
    assert mixed.grid is None
    alone = backbone(backbone.collate([wide]), "all")
    assert alone.grid is not None
    assert alone.grid.height * alone.grid.width == alone.mask.sum() == alone.hidden.shape[2]
    assert alone.grid.width > alone.grid.height
    count = alone.hidden.shape[2]
    assert mixed.mask[0].sum() == count
    torch.testing.assert_close(mixed.hidden[0, :, :count], alone.hidden[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov2_registers", "dinov3"])
def test_non_square_input(name, tmp_path):
    save_vision(name, tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}", image_size=(8, 24))
    features = backbone(backbone.collate(pictures(2)))
    assert features.grid == backbone.grid == Grid(2, 6)
    assert features.hidden.shape[2] == backbone.prefix + 12
    assert backbone.input_image(pictures(1)[0]).size == (24, 8)


def test_input_image_undoes_the_normalisation(host):
    _, _, backbone = host
    image = pictures(1, (16, 16))[0]
    assert list(backbone.input_image(image).get_flattened_data()) == list(image.get_flattened_data())


def test_dtype_and_fingerprint(tmp_path):
    model = save_vision("vit", tmp_path / "a")
    first = load_backbone(str(tmp_path / "a"))
    again = load_backbone(str(tmp_path / "a"))
    half = load_backbone(str(tmp_path / "a"), dtype="bfloat16")
    assert half(half.collate(pictures(1))).hidden.dtype == torch.bfloat16
    with torch.no_grad():
        model.layernorm.bias[0] += 1e-3
    model.save_pretrained(tmp_path / "b")
    save_processor(tmp_path / "b", 16)
    changed = load_backbone(str(tmp_path / "b"))
    assert first.fingerprint() == again.fingerprint()
    assert len({b.fingerprint() for b in (first, half, changed)}) == 3
    assert first.transform_id() == changed.transform_id()
    assert first.transform_id() != load_backbone(str(tmp_path / "a"), image_size=20).transform_id()


def test_a_pooler_without_weights_is_not_offered(tmp_path):
    config = transformers.ViTConfig(**VISION)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)  # has no pooler
    save_processor(tmp_path, 16)
    backbone = load_backbone(str(tmp_path))
    assert backbone.pooled_dim is None
    assert backbone(backbone.collate(pictures(1))).pooled is None


def test_missing_weights_are_refused(tmp_path):
    config = transformers.ViTConfig(**VISION)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    config.num_hidden_layers = 5
    config.save_pretrained(tmp_path)
    save_processor(tmp_path, 16)
    with pytest.raises(ValueError, match=r"lacks .* weights"):
        load_backbone(str(tmp_path))


def test_no_processor(tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no image processor"):
        load_backbone(str(tmp_path))
