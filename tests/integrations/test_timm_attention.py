"""Rectified SpaAttn in timm's vision transformers."""

import pytest
import torch

timm = pytest.importorskip("timm")

from cenote.attention import RectifiedSpaAttn  # noqa: E402


def vit(**options):
    torch.manual_seed(0)
    model = timm.create_model("test_vit3", pretrained=False, num_classes=5, img_size=(96, 128), **options).eval()
    with torch.no_grad():  # a fresh model's blocks hardly add anything
        for name, parameter in model.named_parameters():
            if "gamma" in name or "qkv" in name:
                parameter.normal_(std=0.5 if "gamma" in name else 0.1)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"class_token": True, "reg_tokens": 3, "global_pool": "token"}, {"gated": True}]
)
def test_dense_limit_sparse_run_and_restoring(options):
    model, image = vit(**({} if "gated" in options else options)), torch.randn(2, 3, 96, 128)
    if "gated" in options:
        for block in model.blocks:
            block.attn.gate = torch.nn.Linear(model.embed_dim, block.attn.attn_dim)
    expected, keys = model(image), list(model.state_dict())
    with RectifiedSpaAttn(block_size=4, p=1.0, allow_padding=True)(model):
        torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.forward_head(model.forward_features(image)), expected, rtol=1e-4, atol=1e-5)
    with RectifiedSpaAttn(block_size=4, top_k=2, p=1e-3, neighbours=False, allow_padding=True)(model) as session:
        sparse = model(image)
        torch.testing.assert_close(model(image[1:]), sparse[1:], rtol=1e-4, atol=1e-5)
    assert 0 < session.density < 0.5
    assert (sparse - expected).abs().max() > 1e-4
    assert torch.equal(model(image), expected)
    assert list(model.state_dict()) == keys


def test_masks_are_refused():
    model, image = vit(), torch.randn(1, 3, 96, 128)
    with RectifiedSpaAttn(block_size=4, allow_padding=True)(model), pytest.raises(ValueError, match="bidirectional"):
        model.forward_features(image, is_causal=True)
    model.blocks[1].attn = torch.nn.Identity()
    refused = pytest.raises(ValueError, match="must have timm's Attention, got Identity")
    with refused, RectifiedSpaAttn(block_size=4)(model):
        pass
    assert type(model.blocks[0].attn).__name__ == "Attention"
