"""Sparse attention in a video transformer of diffusers, rectified and plain, at the same density."""

import torch
from diffusers import WanTransformer3DModel

from cenote.attention import RectifiedSpaAttn

torch.manual_seed(0)
# WanTransformer3DModel.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="transformer") on a GPU
size = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "ffn_dim": 96}
model = WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, freq_dim=32, **size).eval()
coarse = torch.randn(1, 4, 2, 4, 4)
latents = torch.nn.functional.interpolate(coarse, size=(8, 32, 32), mode="trilinear")
inputs = {"hidden_states": latents, "timestep": torch.tensor([500]), "encoder_hidden_states": torch.randn(1, 8, 16)}


@torch.no_grad()
def predict():
    return model(**inputs).sample


dense = predict()
print("presets for:", RectifiedSpaAttn.preset("wan2.1_t2v"))
for compensate in ("none", "gain"):
    recipe = RectifiedSpaAttn(drop_rate=0.9, p=1e-6, block_size=64, neighbours=False, compensate=compensate)
    with recipe(model) as session:
        sparse = predict()
    error = float((sparse - dense).norm() / dense.norm())
    print(f"compensate={compensate!r}: density {session.density:.2f}, error {error:.4f}")
print("the model as it was:", torch.equal(predict(), dense))
