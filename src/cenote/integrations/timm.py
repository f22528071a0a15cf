"""Poolings in the place of a timm network's global pooling."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.pooling import create_pooling
from cenote.pooling.base import Pooling


class MapPool(nn.Module):
    """A pooling as timm's ``SelectAdaptivePool2d``: a feature map in, a vector out.

    Args:
        pooling: reads the cells of the map, row by row, as tokens.
        flatten: give ``(batch, out_dim)``; otherwise ``(batch, out_dim, 1, 1)``, as timm's heads that norm first want.
        input_fmt: ``"NCHW"`` or ``"NHWC"``.
    """

    def __init__(self, pooling: Pooling, flatten: bool = True, input_fmt: str = "NCHW") -> None:
        super().__init__()
        if input_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"input_fmt must be 'NCHW' or 'NHWC', got {input_fmt!r}")
        self.pooling, self.flatten, self.input_fmt = pooling, flatten, input_fmt
        self.pool_type = getattr(pooling, "name", type(pooling).__name__)

    def forward(self, x: Float[Tensor, "batch a b c"]) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) if self.input_fmt == "NCHW" else x.flatten(1, 2)
        vector = self.pooling(tokens)
        if self.flatten:
            return vector
        return vector[:, :, None, None] if self.input_fmt == "NCHW" else vector[:, None, None, :]

    def feat_mult(self) -> int:
        """How many times wider the vector is than the map, as timm asks."""
        return self.pooling.out_dim // self.pooling.dim


def set_global_pool(
    model: nn.Module,
    readout: str | Pooling,
    *,
    num_classes: int | None = None,
    prefix: bool = False,
    **options: Any,
) -> nn.Module:
    """Put a pooling where a timm network pools its tokens or its last map, in place.

    Vision transformers get it as ``attn_pool``, convolutional and hierarchical networks as ``global_pool`` (of the
    model or of its head): timm's own places, so that ``forward_features``, ``forward_head(x, pre_logits=True)``,
    ``get_classifier``, training scripts and checkpoints work as ever. Only ``reset_classifier`` does not know of the
    pooling: call this again with ``num_classes`` instead. A classifier (and a norm in front of it) whose width no
    longer fits is replaced by a fresh one.

    Args:
        model: from ``timm.create_model``.
        readout: a spec for :func:`cenote.pooling.create_pooling`, or a pooling of the network's width.
        num_classes: of the classifier; as before unless given, 0 for none.
        prefix: let the pooling see class token and registers as well as patches.
        options: of the pooling.

    Raises:
        ValueError: a readout of several layers, a network that pools in none of the known places or is otherwise
            between its last map and its classifier than those known (VGG, DLA, MetaFormer, ...).
    """
    width = getattr(model, "num_features", None)
    if not isinstance(width, int) or not hasattr(model, "get_classifier"):
        raise ValueError(f"expected a network of timm, got {type(model).__name__}")
    if isinstance(readout, str):
        # Of a hierarchical network this is the grid of its first stage, not of the map that is pooled.
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None) if hasattr(model, "attn_pool") else None
        pooling = create_pooling(readout, dim=width, **{**({"grid": tuple(grid)} if grid else {}), **options})
    else:
        pooling = readout
    if pooling.layers != "last":
        raise ValueError(f"{readout!r} reads several layers, and timm's heads see the last one: use cenote.backbones")
    if pooling.dim != width:
        raise ValueError(f"{type(model).__name__} has width {width}, but the pooling was built for {pooling.dim}")
    device = next(model.parameters()).device
    classes = getattr(model, "num_classes", 0) if num_classes is None else num_classes
    read = pooling.out_dim
    if hasattr(model, "attn_pool") and hasattr(model, "pool"):
        _into_transformer(model, pooling, prefix)
    elif prefix:
        raise ValueError(f"{type(model).__name__} has no prefix tokens")
    elif not _into_map_head(model, pooling):
        # Between pooling and classifier there may be a layer that widens, as in MobileNetV3.
        read = getattr(model, "head_hidden_size", None) or read
    _fit_classifier(model, read, classes)
    return model.to(device)


def _into_transformer(model: Any, pooling: Pooling, prefix: bool) -> None:
    model.attn_pool, model.global_pool = pooling, "map"
    if hasattr(model, "pool_include_prefix"):
        model.pool_include_prefix = prefix
    elif prefix:
        raise ValueError(f"{type(model).__name__} always leaves its prefix tokens out")
    norm = getattr(model, "fc_norm", None)
    if isinstance(norm, nn.LayerNorm) and norm.normalized_shape != (pooling.out_dim,):
        model.fc_norm = type(norm)(pooling.out_dim, eps=norm.eps)


def _into_map_head(model: Any, pooling: Pooling) -> bool:
    """Whether the classifier follows at once."""
    places: list[Any] = [
        part for part in (model, getattr(model, "head", None)) if isinstance(_old_pool(part), nn.Module)
    ]
    if not places:
        raise ValueError(
            f"{type(model).__name__} pools in a place that is not known: neither attn_pool nor global_pool"
        )
    owner = places[0]
    old = _old_pool(owner)
    input_fmt = str(getattr(model, "output_fmt", "NCHW")).rpartition(".")[2]
    shape = (1, pooling.dim, 2, 2) if input_fmt == "NCHW" else (1, 2, 2, pooling.dim)
    parameter = next(model.parameters())
    vector = old(torch.zeros(shape, device=parameter.device, dtype=parameter.dtype))
    flat = vector.ndim == 2
    _check_width(model, owner, vector.shape[1] if flat else pooling.dim, flat)
    if not flat and pooling.out_dim != pooling.dim:
        raise ValueError(f"the head of {type(model).__name__} goes on with a map of the old width: keep {pooling.dim}")
    owner.global_pool = MapPool(pooling, flat, input_fmt)
    return flat


def _check_width(model: Any, owner: Any, pooled: int, flat: bool) -> None:
    """Raise where maps are widened in front of the pooling, or vectors behind it in a way that is not known.

    Args:
        model: the network.
        owner: what holds the pooling: the network or its head.
        pooled: width of what the pooling gives.
        flat: whether it gives vectors rather than maps of one cell.
    """
    kind = type(model).__name__
    classifier = model.get_submodule(_classifier_name(model))
    if not isinstance(classifier, nn.Linear | nn.Identity):
        raise ValueError(f"{kind} has a {type(classifier).__name__} for a classifier: expected a linear layer")
    if not isinstance(getattr(owner, "in_conv", None), nn.Identity | None):
        raise ValueError(f"{kind} widens its last map before it pools it, which num_features does not say")
    expected = {pooled}
    if owner is model or not flat:
        expected.add(getattr(model, "head_hidden_size", None) or pooled)
    read = classifier.in_features if isinstance(classifier, nn.Linear) else getattr(owner, "in_features", None)
    if isinstance(read, int) and read not in expected:
        raise ValueError(f"the head of {kind} makes {read} features of {pooled} in a way that is not known")


def _classifier_name(model: Any) -> str:
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    if not isinstance(name, str):
        raise ValueError(f"{type(model).__name__} has several classifiers ({', '.join(name)}): set them by hand")
    return name


def _old_pool(part: Any) -> Any:
    return getattr(part, "global_pool", None)


def _fit_classifier(model: Any, width: int, classes: int) -> None:
    """A linear classifier of the right size where there was one."""
    name = _classifier_name(model)
    old = model.get_submodule(name)
    fits = isinstance(old, nn.Linear) and (old.in_features, old.out_features) == (width, classes)
    if not fits and not (isinstance(old, nn.Identity) and classes == 0):
        fresh = nn.Linear(width, classes) if classes else nn.Identity()
        model.set_submodule(name, fresh, strict=True)
    model.num_classes = classes
    model.head_hidden_size = width
