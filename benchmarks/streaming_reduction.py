"""Memory of reducing every layer of a network to one vector: as the layers come, against keeping them all first.

What is counted is what a forward pass holds at its peak beyond the same pass without hidden states: every tensor
storage that torch makes, from its making to its release, so the figures do not depend on the machine's load. Peer: the
usual way, transformers' ``output_hidden_states=True`` and then the means. The ratio is peer over ours at the most
tokens times layers; rows show how either grows.
"""

from __future__ import annotations

import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import finish
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cenote.backbones import load_backbone
from cenote.backbones.base import Backbone
from cenote.ops.masked import masked_mean

DIM, BATCH, GOAL = 64, 4, 20.0
SIZES = [(8, 6), (8, 24), (16, 6), (16, 12), (16, 24)]
"""Sides of the patch grid and numbers of layers."""


class Held(TorchDispatchMode):
    """Bytes of the storages that operators made and nobody has released yet, and the most of them at one time."""

    def __enter__(self) -> Held:
        self.now = self.peak = 0
        self.known: set[int] = set()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self.known:  # views share their base's
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak(call: Callable[[], Any]) -> int:
    """Most bytes held at one time during a call."""
    with Held() as held:
        result = call()
        del result
    return held.peak


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """One vector a row."""
    return masked_mean(hidden, mask)[:, None]


def network(side: int, layers: int, folder: Path) -> Backbone:
    """A random ViT of transformers on side x side patches."""
    config = transformers.ViTConfig(
        hidden_size=DIM, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * DIM,
        image_size=4 * side, patch_size=4,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(folder)
    size = {"height": 4 * side, "width": 4 * side}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    return load_backbone(f"hf:{folder}")


def row(side: int, layers: int) -> dict[str, Any]:
    """Bytes beyond a plain forward pass, and that both ways give the same vectors."""
    with tempfile.TemporaryDirectory() as folder:
        backbone = network(side, layers, Path(folder))
    batch = {"pixel_values": torch.randn(BATCH, 3, 4 * side, 4 * side)}

    @torch.inference_mode()
    def keep() -> Tensor:
        states = backbone.module(**batch, output_hidden_states=True).hidden_states
        return torch.stack([state.mean(dim=1) for state in states[1:]], dim=1)

    def stream() -> Tensor:
        return backbone(batch, layers="all", reduce=mean).hidden[:, :, 0]

    # The last hidden state of the backbone is taken after the final norm, that of the peer before.
    torch.testing.assert_close(stream()[:, :-1], keep()[:, :-1], rtol=1e-4, atol=1e-5)
    plain = peak(lambda: backbone(batch, layers="last", reduce=mean))
    streamed, kept = peak(stream) - plain, peak(keep) - plain
    tokens = side * side + 1
    return {
        "tokens": tokens, "layers": layers, "all hidden states, kB": BATCH * tokens * layers * DIM * 4 / 1e3,
        "forward pass, kB": plain / 1e3, "streaming beyond it, kB": streamed / 1e3, "kept beyond it, kB": kept / 1e3,
        "ratio": kept / max(streamed, 1),
    }  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    rows = [row(*size) for size in (SIZES[:2] if "--quick" in sys.argv else SIZES)]
    finish("memory of reducing every layer", "output_hidden_states", GOAL, rows, rows[-1]["ratio"], __doc__)


if __name__ == "__main__":
    main()
