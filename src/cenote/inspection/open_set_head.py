"""The linear last layer of a classifier, wherever its library keeps it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PLACES = ("head", "fc", "heads", "classifier", "score")
"""Attributes under which cenote, timm, torchvision and transformers keep it."""


def linear_head(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight ``(classes, dim)`` and bias ``(classes,)`` of the last layer.

    Args:
        model: a linear layer, a :class:`cenote.probe.Readout`, a timm model, a torchvision or transformers classifier.
            In a head of several layers the last linear one counts, and its input is what a score reads.

    Raises:
        TypeError: not a module.
        ValueError: no linear layer there, or one whose output is not ``W x + b`` (a cosine or scaled head).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a classifier (torch.nn.Module), got {type(model).__name__}")
    layer = _last_linear(model)
    if layer is None:
        raise ValueError(
            f"{type(model).__name__} has no linear last layer (looked at get_classifier() and at "
            f"{', '.join(PLACES)}): give weight and bias instead"
        )
    weight = layer.weight.detach()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    _check_is_affine(layer, weight, bias)
    return weight, bias


def _last_linear(model: nn.Module) -> nn.Linear | None:
    if isinstance(model, nn.Linear):
        return model
    ask = getattr(model, "get_classifier", None)
    places = [ask()] if callable(ask) else [getattr(model, place, None) for place in PLACES]
    for place in places:
        if isinstance(place, nn.Module):
            linear = [module for module in place.modules() if isinstance(module, nn.Linear)]
            if linear:
                return linear[-1]
    return None


@torch.no_grad()
def _check_is_affine(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Subclasses of a linear layer may normalise or scale: try it rather than trust it."""
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    training = layer.training
    given = layer.eval()(x)
    layer.train(training)
    wanted = torch.nn.functional.linear(x, weight, bias)
    tolerance = 10 * float(torch.finfo(weight.dtype).eps) ** 0.5 * float(wanted.abs().max().clamp_min(1e-12))
    if given.shape != wanted.shape or float((given - wanted).abs().max()) > tolerance:
        raise ValueError(
            f"{type(layer).__name__} does not compute W x + b (a cosine or scaled head?): open-set scores need logits "
            "that are linear in the features"
        )
