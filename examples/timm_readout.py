"""A pooling in the place of a timm network's own: forward, head and checkpoint work as before."""

import timm
import torch

from cenote.integrations.timm import set_global_pool

image = torch.randn(2, 3, 160, 160)
for name in (
    "test_vit",
    "test_resnet",
):  # small networks of timm; pretrained=True loads weights where there is a network
    model = timm.create_model(name, pretrained=False, num_classes=10)
    set_global_pool(model, "efficient_probing(num_queries=4)")
    vector = model.forward_head(model.forward_features(image), pre_logits=True)
    print(f"{name}: vector {tuple(vector.shape)}, logits {tuple(model(image).shape)}")

transformer = set_global_pool(timm.create_model("test_vit", pretrained=False), "simpool", num_classes=0)
_, weights = transformer.attn_pool(transformer.forward_features(image)[:, 1:], return_weights=True)
print("what each query looks at:", tuple(weights.shape))
