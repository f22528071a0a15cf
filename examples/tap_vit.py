"""Token-aware pooling inside a timm vision transformer, the diversification loss without attention maps, and errors
under corruptions."""

import timm
import torch
from torch.nn import functional as F

from cenote.inspection.robustness import measure_robustness
from cenote.integrations.attention_capture import AttentionCapture
from cenote.integrations.tap import InsertedPooling

torch.manual_seed(0)
model = timm.create_model("test_vit", pretrained=False, num_classes=10)  # pretrained=True where there is a network
images, labels = torch.rand(8, 3, 160, 160), torch.arange(8)
before = model.eval()(images)

poolings = InsertedPooling(model, num_scales=4)
added = sum(parameter.numel() for tap in poolings.poolings for parameter in tap.parameters())
print(f"{len(poolings.poolings)} blocks pool on a grid of {poolings.grid}, {added} parameters more")

with AttentionCapture(model.train()) as seen:
    task = F.cross_entropy(model(images), labels)
    loss = task + 1.0 * seen.loss(threshold=1.5)
loss.backward()
print("layers in the loss:", len(seen.layers), "- similarity without thresholds:", round(seen.similarity().item(), 2))

robust = measure_robustness(model, images, labels, corruptions=("gaussian_noise", "jpeg"), severities=(1, 5))
print("under corruptions:", sorted(robust.errors), "- mCE against itself:", robust.mean_corruption_error(robust))

poolings.remove()
print("the model as it was:", torch.equal(model.eval()(images), before))
