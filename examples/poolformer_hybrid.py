"""A vision backbone whose stages mix in different ways, and the maps that a detector would take from it."""

import torch

from cenote.mixing.poolformer import StagedMetaFormer, poolformer

torch.manual_seed(0)
images = torch.randn(2, 3, 96, 128)

# A published size: S12 with ten classes.
model = poolformer("s12", num_classes=10).eval()
with torch.no_grad():
    print("logits", tuple(model(images).shape))

# Any mixers, one pattern a stage: pooling early, attention in the last stage and every third block of the one before.
hybrid = StagedMetaFormer(
    layers=(2, 2, 6, 2),
    dims=(64, 128, 320, 512),
    mixers=["pool", "pool", "pool*2, softmax_attention(head_dim=32)", "softmax_attention(head_dim=32)"],
    norm="layer",
    fork_feat=True,
).eval()
print("third stage:", ", ".join(type(block.token_mixer).__name__ for block in hybrid.network[4]))
with torch.no_grad():
    for stride, each in zip((4, 8, 16, 32), hybrid(images), strict=True):
        print(f"stride {stride}: {tuple(each.shape)}")
