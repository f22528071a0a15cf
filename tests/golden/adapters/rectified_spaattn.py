"""Rectified SpaAttn over visual tokens alone, or over visual tokens and text: the curve, the selection, the output."""

import torch
from torch import Tensor

from cenote.ops.rectified_attention import rectified_attention
from cenote.ops.space_filling_curve import block_neighbours, hilbert_order, inverse_order
from golden.cases import Case

SETTINGS = {
    "block_size", "top_k", "p", "first_frame_blocks", "latent_shape", "axis_order", "text_len", "use_neighbors",
}  # fmt: skip


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if "rectified block-sparse" not in case.target:
        raise ValueError(f"unknown target {case.target!r}")
    unknown = set(case.config) - SETTINGS
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    config, inputs = case.config, case.inputs
    block_size, shape = config["block_size"], config["latent_shape"]
    order = hilbert_order(shape, config.get("axis_order", ("w", "h", "t")))
    neighbours = block_neighbours(order, shape, block_size)
    text_len = config.get("text_len", 0)
    result = rectified_attention(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        block_size=block_size,
        p=config.get("p", 0.3),
        top_k=config["top_k"],
        text_len=text_len,
        text_valid=inputs.get("text_valid"),
        neighbours=neighbours if config.get("use_neighbors", True) else None,
        first_frame_blocks=config.get("first_frame_blocks", 0),
        mean="padded",
    )
    # The official mask has a column for every block of text as well; those are always kept.
    text_blocks = -(-text_len // block_size)
    return {
        "linear_to_curve": inverse_order(order),
        "curve_to_linear": order,
        "block_neighbors": neighbours,
        "probs": result.probs,
        "block_mask": torch.nn.functional.pad(result.block_mask, (0, text_blocks), value=True),
        "compensated": result.compensated,
        "attn": result.output.transpose(1, 2),
    }
