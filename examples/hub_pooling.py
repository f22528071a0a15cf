"""A pooling saved, loaded and ready for the Hugging Face hub."""

import tempfile

import torch

from cenote.integrations.hub import HubPooling

model = HubPooling("weighted_layers > efficient_probing", dim=64, options={"num_layers": 4, "num_queries": 8}).eval()
hidden = torch.randn(2, 4, 16, 64)  # (batch, layers, tokens, dim)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # config.json, model.safetensors, README.md
    again = HubPooling.from_pretrained(folder)
print("same vectors:", torch.equal(again(hidden), model(hidden)))
# model.push_to_hub("user/name") uploads the same three files.
