"""Halo attention in timm's networks, and timm's halo networks as ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cenote.mixing.halo_attention import HaloAttention
from cenote.mixing.halonet import HaloBlock, HaloNet


def replace_halo(model: nn.Module, **options: Any) -> nn.Module:
    """Put :class:`HaloAttention` in the place of every timm ``HaloAttn``, in place, with the same parameters.

    Outputs and ``state_dict`` stay as they were, training goes on with the same optimiser, and any network of timm
    goes (``halonet50ts``, ``sehalonet33ts``, ``eca_halonext26ts``, ``haloregnetz_b``, ...).

    Args:
        model: contains timm's layers, or is one.
        **options: settings that timm's layer has not: ``mask_padding``, ``auto_pad``, ``border``. The first and the
            last change the outputs.

    Returns:
        the model; the new layer where the model was itself a layer.

    Raises:
        ImportError: timm is not installed.
        ValueError: there is no such layer.
    """
    if isinstance(model, _timm_layer()):
        return _from_timm_layer(model, **options)
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _timm_layer())]
    if not found:
        raise ValueError(f"{type(model).__name__} contains no HaloAttn of timm")
    for name, layer in found:
        model.set_submodule(name, _from_timm_layer(layer, **options), strict=True)
    return model


def halonet_from_timm(model: str | nn.Module, pretrained: bool = True, **options: Any) -> HaloNet:
    """A :class:`HaloNet` with the structure and the weights of a timm network of halo and 3 x 3 blocks.

    Args:
        model: a name of timm (``"halonet26t.a1h_in1k"``, ``"halonet50ts"``, ``"hf-hub:timm/..."``), or a ``ByobNet``.
        pretrained: with a name, load its published weights through timm, which asks the hub once and then its cache.
        **options: as for :func:`replace_halo`.

    Raises:
        ImportError: timm is not installed.
        ValueError: parts that HaloNet does not have, such as squeeze-and-excitation: take :func:`replace_halo`.
    """
    if isinstance(model, str):
        model = _timm().create_model(model, pretrained=pretrained)
    byob: Any = model
    try:
        stages = [[_block(block, options) for block in stage] for stage in byob.stages]
        stem, width, pool = _stem(byob.stem)
        act = _act(byob.stem.conv1.bn.act)
        classifier = byob.head.fc
    except AttributeError as problem:
        raise ValueError(
            f"{type(model).__name__} is no network of halo and 3 x 3 blocks ({problem}): replace_halo changes only "
            "its halo layers"
        ) from None
    features = None if isinstance(byob.final_conv, nn.Identity) else byob.num_features
    with torch.device("meta"):
        net = HaloNet(
            stages,
            stem=stem,
            stem_width=width,
            stem_pool=pool,
            act=act,
            num_features=features,
            num_classes=classifier.out_features if isinstance(classifier, nn.Linear) else 0,
            in_chans=byob.stem.conv1.conv.in_channels,
        )
    net.load_state_dict(byob.state_dict(), assign=True)
    return net.train(byob.training)


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise ImportError("timm's networks need timm: pip install 'cenote[vision]'") from None
    return timm


def _timm_layer() -> Any:
    _timm()
    from timm.layers.halo_attn import HaloAttn

    return HaloAttn


def _layer_options(layer: Any) -> dict[str, Any]:
    """What builds a layer of the same function."""
    pooled = isinstance(layer.pool, nn.AvgPool2d)
    return {
        "num_heads": layer.num_heads,
        "dim_head": layer.dim_head_qk,
        "block_size": layer.block_size,
        "halo_size": layer.halo_size,
        "qkv_bias": layer.q.bias is not None,
        "scale_pos_embed": layer.scale_pos_embed,
        "avg_down": pooled,
    }


def _layer_stride(layer: Any) -> int:
    return 2 if isinstance(layer.pool, nn.AvgPool2d) else layer.block_stride


def _from_timm_layer(layer: Any, **options: Any) -> HaloAttention:
    with torch.device("meta"):
        ours = HaloAttention(
            layer.q.in_channels, layer.dim_out_v, _layer_stride(layer), **{**_layer_options(layer), **options}
        )
    ours.q, ours.kv = layer.q, layer.kv
    ours.pos_embed.height_rel, ours.pos_embed.width_rel = layer.pos_embed.height_rel, layer.pos_embed.width_rel
    # timm's strided convolution of the queries becomes a plain one here: HaloAttention picks the cells itself.
    return ours.train(layer.training)


def _block(block: Any, options: dict[str, Any]) -> HaloBlock:
    extra = [name for name in ("attn", "attn_last") if not isinstance(getattr(block, name, None), nn.Identity | None)]
    if extra:
        raise AttributeError(f"a block with {type(getattr(block, extra[0])).__name__}")
    inner, out = block.conv1_1x1.conv.out_channels, block.conv3_1x1.conv.out_channels
    if hasattr(block, "self_attn"):
        layer = block.self_attn
        if not isinstance(layer, _timm_layer()) or not isinstance(block.conv2_kxk, nn.Identity):
            raise AttributeError(f"a block with {type(layer).__name__}")
        settings = {**_layer_options(layer), **options}
        return HaloBlock("attention", inner, out, _layer_stride(layer), layer.dim_out_v, attention=settings)
    convolution = block.conv2_kxk.conv
    if convolution.kernel_size != (3, 3) or convolution.dilation != (1, 1):
        raise AttributeError(f"a convolution of {convolution.kernel_size}, dilation {convolution.dilation}")
    return HaloBlock("convolution", inner, out, convolution.stride[0], groups=convolution.groups)


def _stem(stem: Any) -> tuple[str, int, bool]:
    """Kind and width, and whether it ends in a maximum."""
    layers = dict(stem.named_children())
    pool = layers.pop("pool", None)
    convolutions = [layer.conv for layer in layers.values()]
    widths, width = [each.out_channels for each in convolutions], convolutions[-1].out_channels
    strided = [each.stride[0] for each in convolutions]
    kernel = convolutions[0].kernel_size[0]
    kinds: dict[tuple[int, tuple[int, ...]], str] = {
        (3, (width, width, width)): "deep",
        (3, (3 * width // 8, width // 2, width)): "tiered",
        (3, (width,)): "3x3",
        (7, (width,)): "7x7",
    }
    kind = kinds.get((kernel, tuple(widths)))
    if kind is None or strided != [2] + [1] * (len(strided) - 1) or not isinstance(pool, nn.MaxPool2d | None):
        raise AttributeError(f"a stem of widths {widths} and strides {strided}")
    return kind, width, pool is not None


def _act(layer: nn.Module) -> str:
    kinds: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}
    for kind, name in kinds.items():
        if isinstance(layer, kind) or type(layer).__name__ == kind.__name__:
            return name
    raise AttributeError(f"the activation {type(layer).__name__}")
