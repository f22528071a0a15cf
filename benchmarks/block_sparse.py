"""Block-sparse prompts at 90 % sparsity against dense causal scaled_dot_product_attention, both backends.

Eight heads of 64, blocks of 128, float32: every row of blocks keeps the same number of them, its own among them, so
that a tenth of the causal triangle is left. Outputs are checked against masked dense attention before anything is
timed. The ratio is dense time over FlexAttention's at the first length; the rows hold both backends at every length
(the clock of FlexAttention starts behind its compilation) and a whole small Llama whose prompt runs through the same
blocks, its choice included.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from common import finish, interleaved, ratio
from transformers import LlamaConfig, LlamaForCausalLM

from cenote.attention import SeerAttention
from cenote.attention.host import Host
from cenote.ops.block_gate import choose_blocks
from cenote.ops.block_sparse import block_sparse_attention
from cenote.ops.blocks import block_mask_to_tokens, density

GOALS = {("flex", 8192): 5.6, ("flex", 16384): 7.0, ("torch", 8192): 4.5, ("torch", 16384): 4.5}
NZ_RATIO = 0.1


def random_blocks(heads: int, blocks: int, kept: float) -> torch.Tensor:
    """A random choice that keeps each block's own neighbourhood, as learned ones do."""
    logits = torch.randn(1, heads, blocks, blocks)
    logits.diagonal(dim1=-2, dim2=-1).fill_(9.0)
    return choose_blocks(logits, nz_ratio=kept, last_block_dense=False)


@torch.no_grad()
def kernel_rows(tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    size, heads, device = options.block_size, options.heads, options.device
    query, key, value = torch.randn(3, 1, heads, tokens, options.head_dim, device=device)
    blocks = random_blocks(heads, -(-tokens // size), NZ_RATIO).to(device)
    calls: dict[str, Any] = {"dense": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)}
    for backend in ("torch", "flex"):
        calls[backend] = lambda b=backend: block_sparse_attention(query, key, value, blocks, size, backend=b)
    tail = slice(tokens - min(tokens, 2 * size), tokens)  # enough rows to tell a wrong kernel, without the whole map
    pairs = block_mask_to_tokens(blocks, size, tokens, tokens)[:, :, tail]
    pairs = pairs & (torch.arange(tokens, device=device) <= torch.arange(tokens, device=device)[tail, None])
    expected = F.scaled_dot_product_attention(query[:, :, tail], key, value, pairs)
    for backend in ("torch", "flex"):
        torch.testing.assert_close(calls[backend]()[:, :, tail], expected, rtol=1e-3, atol=1e-4)
    times = interleaved(calls, options.repeats, 1)
    return [
        {
            "device": device, "threads": torch.get_num_threads(), "what": "attention", "backend": backend,
            "tokens": tokens, "density": density(blocks), "dense ms": min(times["dense"]) * 1e3,
            "sparse ms": min(times[backend]) * 1e3, "ratio": ratio(times, "dense", backend),
            "goal": GOALS.get((backend, tokens)),
        }
        for backend in ("torch", "flex")
    ]  # fmt: skip


@torch.no_grad()
def model_rows(tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A Llama of four layers: the gate has random weights, which costs what trained ones cost."""
    dim = options.heads * options.head_dim
    config = LlamaConfig(
        vocab_size=512, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, num_key_value_heads=options.heads, max_position_embeddings=2 * tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to(options.device)
    ids = torch.randint(0, 512, (1, tokens), device=options.device)
    recipe = SeerAttention(block_size=options.block_size, nz_ratio=NZ_RATIO, last_block_dense=False)
    recipe = recipe.with_gates(recipe.new_gates(Host.of(model)))
    rows = []

    def dense() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    for backend in ("torch", "flex"):
        with dataclasses.replace(recipe, backend=backend)(model) as session:
            for _ in range(2):
                dense()
            kept = session.density()

        def sparse(backend: str = backend) -> None:
            with dataclasses.replace(recipe, backend=backend)(model):
                model(input_ids=ids, use_cache=False, logits_to_keep=1)

        times = interleaved({"dense": dense, "sparse": sparse}, options.repeats, 1)
        rows.append(
            {
                "device": options.device, "threads": torch.get_num_threads(), "what": "model", "backend": backend,
                "tokens": tokens, "density": kept, "dense ms": min(times["dense"]) * 1e3,
                "sparse ms": min(times["sparse"]) * 1e3, "ratio": ratio(times, "dense", "sparse"), "goal": None,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="of the model; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=5)
    options, _ = parser.parse_known_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows = [row for tokens in options.tokens for row in kernel_rows(tokens, options)]
    value = next(row["ratio"] for row in rows if row["backend"] == "flex")
    if options.layers:
        rows += model_rows(options.tokens[0], options)
    finish("block_sparse", "dense causal scaled_dot_product_attention", GOALS["flex", 8192], rows, value, __doc__)


if __name__ == "__main__":
    main()
