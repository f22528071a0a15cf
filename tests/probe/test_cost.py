"""What a readout is said to cost."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cenote.pooling.base import Pooling
from cenote.probe.cost import macs


class SelfAttention(Pooling):
    name = "self_attention"

    def _pool(self, tokens, mask):
        x = tokens[:, None]
        return F.scaled_dot_product_attention(x, x, x)[:, 0].mean(dim=1), None


@pytest.mark.parametrize("tokens", [5, 12])
def test_fused_attention_counts_like_any_other_product(tokens):
    counted = macs(SelfAttention(8), nn.Linear(8, 3), torch.randn(2, tokens, 8), None)
    assert counted == 2 * tokens * tokens * 8 + 8 * 3
