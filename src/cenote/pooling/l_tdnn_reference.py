"""Official L-TDNN checkpoints: key names and sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# In order: official pattern (behind "encoder."), own name.
_RENAME = (
    (r"net\.in_conv\.0\.", "net.in_norm."),
    (r"net\.in_conv\.1\.", "net.in_conv."),
    (r"net\.fusion\.0\.", "net.fusion."),
    (r"net\.se_d2blocks\.(\d+)\.layers\.", r"net.blocks.\1.convs."),
    (r"net\.se_d2blocks\.(\d+)\.se\.", r"net.blocks.\1."),
    (r"\.se_res2block\.0\.", ".reduce."),
    (r"\.se_res2block\.1\.convs\.", ".convs."),
    (r"\.se_res2block\.2\.", ".expand."),
    (r"\.se_res2block\.3\.", "."),
    (r"\.se_attention\.1\.", ".se.squeeze."),
    (r"\.se_attention\.3\.", ".se.excite."),
    (r"\.conv\.", "."),
    (r"\.bn\.", ".norm."),
    (r"l_pool\.([Wb][12])$", lambda m: f"layer_pool.{m[1].lower()}"),
    (r"l_pool\.in_projection\.0\.", "layer_pool.in_norm."),
    (r"l_pool\.in_projection\.1\.", "layer_pool.in_projection."),
    (r"l_pool\.out_projection\.0\.", "layer_pool.out_projection."),
    (r"l_pool\.out_projection\.1\.", "layer_pool.out_norm."),
    (r"t_pool\.attention\.0\.", "attention_in."),
    (r"t_pool\.attention\.2\.", "attention_norm."),
    (r"t_pool\.attention\.3\.", "attention_out."),
    (r"t_pool\.attn_norm\.", "statistics_norm."),
    (r"t_pool\.out_proj\.", "out_projection."),
    (r"t_pool\.out_norm\.", "out_norm."),
)
_OFFICIAL_SIZES = {
    "in_channels": "dim", "n_layers": "num_layers", "n_head": "num_heads", "conv_dim": "conv_dim",
    "hidden_size": "hidden_size", "pool_dim": "pool_dim", "n_blocks": "num_blocks", "depth": "depth",
    "res2_scale": "res2_scale", "se_channels": "se_channels", "net": "net",
}  # fmt: skip
_OF_THE_LOSS = ("num_loss_heads", "num_classes", "aam_margin", "aam_scale")


def read_reference(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor options and weights in this library's names.

    Args:
        state_dict: official keys; those of the loss (``aam_softmax.``) and of the backbone (``backbone.``) are passed
            over.
        config: official names of sizes, checked against the weights where the network has them (``n_blocks`` and
            ``depth`` are d3net's alone); settings of the loss, passed over; further constructor options.

    Raises:
        ValueError: keys are missing, or a size contradicts the weights.
    """
    state = {}
    for key, tensor in state_dict.items():
        if key.startswith("encoder.") and not key.endswith("num_batches_tracked"):
            name = _own_name(key.removeprefix("encoder."))
            # A pointwise convolution is a matrix; gate biases have an axis of one. Copies, so that training leaves the
            # caller's tensors alone.
            pointwise = name.endswith("weight") and tensor.ndim > 2 and tensor.shape[2:].numel() == 1
            flat = tensor.flatten(1) if pointwise and not _is_convolution(name) else tensor
            state[name] = (flat.squeeze(1) if name.endswith(("b1", "b2")) else flat).clone()
    try:
        sizes = _sizes(state)
    except KeyError as error:
        raise ValueError(f"not a checkpoint of L-TDNN: nothing there becomes {error}") from None
    options = {key: value for key, value in config.items() if key not in (*_OFFICIAL_SIZES, *_OF_THE_LOSS)}
    for official, own in _OFFICIAL_SIZES.items():
        if official == "n_blocks" and sizes["net"] == "ecapa":
            continue  # a setting of d3net: the official ecapa always has three blocks, whatever it says
        if own in sizes and config.get(official, sizes[own]) != sizes[own]:
            raise ValueError(f"{official}={config[official]!r} contradicts the weights, which have {sizes[own]!r}")
    return {**sizes, **options}, state


def _own_name(name: str) -> str:
    name = re.sub(r"net\.block(\d+)\.", lambda m: f"net.blocks.{int(m[1]) - 1}.", name)
    for pattern, own in _RENAME:
        name = re.sub(pattern, own, name)
    return name


def _is_convolution(name: str) -> bool:
    return bool(re.search(r"(convs\.\d+|reduce|expand|in_conv)\.weight$", name))


def _sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    heads, layers, _ = state["layer_pool.w1"].shape
    conv_dim = len(state["net.in_conv.bias"])
    numbers = {int(name.split(".")[2]) for name in state if name.startswith("net.blocks.")}
    first = len(state["net.blocks.0.convs.0.bias"])
    sizes: dict[str, Any] = {
        "dim": len(state["net.in_norm.weight"]),
        "num_layers": layers,
        "num_heads": heads,
        "conv_dim": conv_dim,
        "hidden_size": len(state["layer_pool.out_projection.weight"]),
        "pool_dim": len(state["out_projection.weight"]),
        "num_blocks": len(numbers),
        "se_channels": len(state["net.blocks.0.se.squeeze.bias"]),
    }
    if "net.blocks.0.reduce.weight" in state:
        return {**sizes, "net": "ecapa", "res2_scale": conv_dim // first}
    depth = len([name for name in state if re.fullmatch(r"net\.blocks\.0\.convs\.\d+\.bias", name)])
    return {**sizes, "net": "d3net", "depth": depth}
