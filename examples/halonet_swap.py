"""A faster halo layer in a network of timm: same weights, same outputs, and images of any size."""

import timm
import torch

from cenote.mixing.halo_timm import replace_halo
from cenote.mixing.halonet import create_halonet

model = timm.create_model("halonet26t", pretrained=False, num_classes=10).eval()
image = torch.randn(1, 3, 256, 256)
with torch.no_grad():
    before = model(image)
    replace_halo(model, auto_pad=True)
    print("the same logits:", torch.allclose(model(image), before, rtol=1e-3, atol=1e-4))
    print("an image that is no multiple of the blocks:", tuple(model(torch.randn(1, 3, 200, 240)).shape))

    maps = create_halonet("h0").eval().stage_maps(torch.randn(1, 3, 128, 128))
print("maps of HaloNet H0:", [tuple(m.shape[1:]) for m in maps])
