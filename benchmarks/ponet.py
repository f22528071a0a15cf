"""A whole PoNet layer against a softmax transformer layer of equal width, by the number of tokens.

Forward pass on one thread, width 128, 4 heads, feed-forward network four times as wide, one text without padding.
Peers: a BERT layer made of PyTorch's fused attention and the same feed-forward network, and transformers' own with
fused and with plain attention. The exponent is the slope of time against length between two rows. ``--train`` times a
training step instead, ``--width`` another width (64 is that of the Long Range Arena; heads keep 32 channels).

Without any overhead, at equal speed of products and attention, the ratio is 1 + tokens / (6 width): 6.3 at 4096 tokens
and width 128, 11.7 at 8192. What is above comes from attention being slower per operation than plain products.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import finish, interleaved, ratio
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from cenote.integrations.ponet_config import PoNetConfig
from cenote.integrations.ponet_encoder import PoNetLayer
from cenote.reproductions.ponet_cost import sentences

OURS, FUSED, HOST, PLAIN = "PoNet", "fused attention", "BertLayer", "BertLayer, plain attention"
GOALS = {4096: 9.0, 8192: 15.0}


class FusedLayer(nn.Module):
    """A post-norm BERT layer around ``scaled_dot_product_attention``, queries, keys and values in one product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = self.norm1(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


def timed(call: Callable[[Tensor], Any], x: Tensor, train: bool) -> Callable[[], Any]:
    def forward() -> None:
        with torch.no_grad():
            call(x)

    def step() -> None:
        out = call(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    return step if train else forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--plain-up-to", type=int, default=4096, help="longest text for plain attention (N x N maps)")
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, heads = options.width, max(1, options.width // 32)
    sizes: dict[str, Any] = {
        "hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    ponet, fused = PoNetLayer(PoNetConfig(**sizes)).eval(), FusedLayer(width, heads).eval()
    host = BertLayer(BertConfig(**sizes, attn_implementation="sdpa")).eval()
    plain = BertLayer(BertConfig(**sizes, attn_implementation="eager")).eval()
    rows: list[dict[str, Any]] = []
    shares: list[float] = []
    for tokens in options.lengths:
        x, context = torch.randn(1, tokens, width, requires_grad=options.train), sentences(tokens)
        layers: dict[str, Callable[[Tensor], Any]] = {
            OURS: lambda x, context=context: ponet(x, None, context), FUSED: fused, HOST: host,
        }  # fmt: skip
        if tokens <= options.plain_up_to:
            layers[PLAIN] = plain
        calls = {name: timed(layer, x, options.train) for name, layer in layers.items()}
        times = interleaved(calls, options.repeats, warmup=2)
        row: dict[str, Any] = {
            "tokens": tokens,
            "width": width,
            "what": "training step" if options.train else "forward",
        }
        for name in layers:
            row[f"{name} ms"] = min(times[name]) * 1e3
        for name in (FUSED, HOST, PLAIN):
            row[f"ratio to {name}"] = ratio(times, name, OURS) if name in layers else None
        if rows:
            grown = math.log(tokens / rows[-1]["tokens"])
            for name in (OURS, FUSED):
                row[f"{name} exponent"] = math.log(row[f"{name} ms"] / rows[-1][f"{name} ms"]) / grown
        if tokens in GOALS:
            row["goal"] = GOALS[tokens]
            shares.append(row[f"ratio to {FUSED}"] / GOALS[tokens])
        rows.append(row)
    # Both goals in one number: the one that is further from being met, in terms of that at 4096 tokens.
    value = GOALS[4096] * min(shares) if shares else rows[-1][f"ratio to {FUSED}"]
    finish("ponet", "fused softmax transformer layer of equal width", GOALS[4096], rows, value, __doc__)


if __name__ == "__main__":
    main()
