"""The linear last layer is found where each library keeps it, and only where it is linear."""

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from cenote.inspection import CoStarr, create_open_set_score
from cenote.inspection.open_set_head import linear_head
from cenote.probe.readout import Readout, ReadoutConfig


def same(found, layer):
    return torch.equal(found[0], layer.weight) and torch.equal(found[1], layer.bias)


def test_linear_layer_with_and_without_bias():
    layer = nn.Linear(5, 3)
    assert same(linear_head(layer), layer)
    bare = nn.Linear(5, 3, bias=False)
    score = CoStarr.from_head(bare)
    assert torch.equal(score.bias, torch.zeros(3))


def test_timm_torchvision_and_transformers():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=1)
    assert same(linear_head(vit), vit.head)
    resnet = torchvision.models.resnet18(num_classes=6)
    assert same(linear_head(resnet), resnet.fc)
    tv = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=4)
    assert same(linear_head(tv), tv.heads.head)
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    image = transformers.ViTForImageClassification(transformers.ViTConfig(**config, image_size=32, num_labels=5))
    assert same(linear_head(image), image.classifier)
    text = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**config, vocab_size=20, num_labels=3)
    )
    assert same(linear_head(text), text.classifier.out_proj)


def test_timm_features_reproduce_the_logits():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=1).eval()
    score = create_open_set_score("maxlogit", model)
    with torch.no_grad():
        images = torch.randn(2, 3, 224, 224)
        hidden = model.forward_features(images)
        features = model.forward_head(hidden, pre_logits=True)
        score.check_logits(features, model(images))
        with pytest.raises(ValueError, match="not the input of the last linear layer"):
            score.check_logits(hidden.mean(dim=1), model(images))


def test_readout():
    config = ReadoutConfig("mean", 6, (1,), "both", "classification", 3, "embedded", classes=("a", "b", "c"))
    readout = Readout(config)
    assert same(linear_head(readout), readout.head)


class Cosine(nn.Linear):
    def forward(self, x):
        return 16 * nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


def test_heads_that_are_not_linear_are_refused():
    with pytest.raises(ValueError, match=r"Cosine does not compute W x \+ b"):
        linear_head(Cosine(5, 3))
    with pytest.raises(ValueError, match="no linear last layer"):
        linear_head(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1))
    with pytest.raises(ValueError, match="no linear last layer"):
        linear_head(nn.Identity())
    with pytest.raises(TypeError):
        linear_head("vit")
