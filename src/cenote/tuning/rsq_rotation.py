"""Rotation of a decoder's residual stream (and of what its output projections read) that leaves its logits alone."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.ops.hadamard import hadamard_matrix, hadamard_transform, has_hadamard, random_hadamard, random_orthogonal

ROTATIONS = ("none", "residual", "full")
TRANSFORMS = ("hadamard", "orthogonal")


class OnlineHadamard:
    """A forward pre-hook: the input of a linear layer through a Hadamard transform, in blocks.

    The last axis is read as ``(before, order, after)`` and transformed along ``order``: ``x (I (x) H (x) I)``.
    """

    def __init__(self, order: int, after: int = 1) -> None:
        self.order, self.after = order, after

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].unflatten(-1, (-1, self.order, self.after)).transpose(-1, -2)
        return (hadamard_transform(x).transpose(-1, -2).flatten(-3), *args[1:])


def random_rotation(size: int, transform: str, seed: int) -> Float[Tensor, "size size"]:
    """The matrix ``Q`` that a seed stands for, in float64: randomly signed Hadamard or uniform.

    Raises:
        ValueError: another name, or a size without a Hadamard matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    if transform == "hadamard":
        return random_hadamard(size, generator)
    if transform == "orthogonal":
        return random_orthogonal(size, generator)
    raise ValueError(f"transform must be one of {TRANSFORMS}, got {transform!r}")


@torch.no_grad()
def rotate_model(
    model: nn.Module,
    q: Float[Tensor, "hidden hidden"],
    rotation: str = "residual",
    *,
    center_embeddings: bool = False,
) -> None:
    """Rotate a Llama, Mistral, Qwen2 or Qwen3 model in place by an orthogonal ``q``; its logits stay.

    The weights of each RMSNorm move into the linear layers behind it, embeddings and head are untied, and the residual
    stream becomes ``x q``. ``"full"`` also transforms the values by a Hadamard matrix inside each head, and what
    ``o_proj`` and ``down_proj`` read by whole ones, whose missing halves run as forward hooks
    (:class:`OnlineHadamard`): it prepares for quantised activations and changes little for weights alone.
    Computed in float64 and rounded to the model's type. From QuaRot (arXiv 2404.00456), as RSQ uses it, except that the
    transform of ``o_proj`` is built from those of heads and of channels, so that it holds for every number of heads.

    Args:
        model: rotated in place.
        q: orthogonal, of the model's width.
        rotation: ``"residual"``, ``"full"`` or ``"none"`` (nothing happens).
        center_embeddings: take the mean out of every embedding, as the official code does. That is right for models
            with LayerNorm and changes the logits of these.

    Raises:
        ValueError: a host that is not served, a matrix that is not orthogonal, or sizes without a Hadamard matrix.
    """
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation must be one of {ROTATIONS}, got {rotation!r}")
    if rotation == "none":
        return
    layers, hidden = check_rotatable(model), model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    if tuple(q.shape) != (hidden, hidden) or not torch.allclose(
        q.double() @ q.double().T, torch.eye(hidden, dtype=torch.float64, device=q.device), atol=1e-4
    ):
        raise ValueError(f"expected an orthogonal matrix of the model's width {hidden}, got shape {tuple(q.shape)}")
    if rotation == "full":
        check_full(layers)
    fuse_norms(model, center_embeddings=center_embeddings)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    device = embedding.weight.device
    q = q.double().to(device)
    _set(embedding.weight, embedding.weight.double() @ q)
    _set(head.weight, head.weight.double() @ q)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            _set(linear.weight, linear.weight.double() @ q)
        for linear in (attention.o_proj, mlp.down_proj):
            _set(linear.weight, q.T @ linear.weight.double())
            if linear.bias is not None:
                _set(linear.bias, q.T @ linear.bias.double())
        if rotation == "full":
            _transform_inner(layer)


def fuse_norms(model: nn.Module, *, center_embeddings: bool = False) -> None:
    """Move the weights of the RMSNorms into the linear layers behind them, and untie the head; logits stay."""
    layers = check_rotatable(model)
    untie(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        if center_embeddings:
            wide = embedding.weight.double()
            _set(embedding.weight, wide - wide.mean(dim=1, keepdim=True))
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            _fuse(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
            _fuse(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))
        _fuse(model.base_model.norm, (head,))


def untie(model: nn.Module) -> None:
    """Give the head its own copy of the embeddings, and say so in the configuration."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def add_online_hadamards(model: nn.Module) -> None:
    """Register the hooks of ``"full"`` on a model whose weights hold the other halves (one read from files)."""
    for layer in check_rotatable(model):
        _hooks(layer)


def check_rotatable(model: Any) -> list[Any]:
    """The layers of a model whose residual stream :func:`rotate_model` can rotate.

    Raises:
        ValueError: norms other than plain RMSNorm, or another structure than Llama's.
    """
    kind = type(model).__name__
    decoder: Any = getattr(model, "base_model", None)
    layers = list(getattr(decoder, "layers", []))
    parts = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    linears = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    known = bool(layers) and hasattr(decoder, "norm") and model.get_output_embeddings() is not None
    for layer in layers:
        modules = dict(layer.named_modules())
        known &= {name for name, _ in layer.named_children()} == parts and all(name in modules for name in linears)
    if not known:
        raise ValueError(f"cannot rotate {kind}: expected a decoder built like Llama, Mistral, Qwen2 or Qwen3")
    norms = [
        decoder.norm,
        *(norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    for norm in norms:
        if not _is_rms_norm(norm):
            raise ValueError(
                f"cannot rotate {kind}: {type(norm).__name__} is not a plain RMSNorm, weight * x / rms(x) "
                "(LayerNorm would need its mean baked into the weights first); use rotation='none'"
            )
    return layers


def check_full(layers: list[Any]) -> None:
    """Raise if a size has no Hadamard matrix."""
    for layer in layers:
        heads, head_dim, inner = _sizes(layer)
        for what, size in (("number of heads", heads), ("head size", head_dim), ("intermediate size", inner)):
            if not has_hadamard(size):
                raise ValueError(
                    f"no Hadamard matrix is known for the {what} {size}: use rotation='residual', with "
                    "transform='orthogonal' if the hidden size has none either"
                )


def _sizes(layer: Any) -> tuple[int, int, int]:
    head_dim = layer.self_attn.head_dim
    return layer.self_attn.o_proj.in_features // head_dim, head_dim, layer.mlp.down_proj.in_features


def _transform_inner(layer: Any) -> None:
    heads, head_dim, inner = _sizes(layer)
    value, out, down = layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.down_proj
    device = down.weight.device
    small, across, whole = (
        hadamard_matrix(size).to(device) * size**-0.5 for size in (head_dim, heads, inner)
    )  # fmt: skip
    _set(value.weight, (small.T @ value.weight.double().unflatten(0, (-1, head_dim))).flatten(0, 1))
    if value.bias is not None:
        _set(value.bias, (value.bias.double().unflatten(0, (-1, head_dim)) @ small).flatten())
    by_head = out.weight.double().unflatten(1, (heads, head_dim))
    _set(out.weight, torch.einsum("ohd,hk,de->oke", by_head, across, small).flatten(1))
    _set(down.weight, down.weight.double() @ whole)
    _hooks(layer)


def _hooks(layer: Any) -> None:
    heads, head_dim, inner = _sizes(layer)
    layer.self_attn.o_proj.register_forward_pre_hook(OnlineHadamard(heads, after=head_dim))
    layer.mlp.down_proj.register_forward_pre_hook(OnlineHadamard(inner))


def _fuse(norm: Any, linears: tuple[Any, ...]) -> None:
    gain = norm.weight.double()
    for linear in linears:
        _set(linear.weight, linear.weight.double() * gain)
    norm.weight.data.fill_(1)


def _is_rms_norm(norm: Any) -> bool:
    weight = getattr(norm, "weight", None)
    eps = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    if weight is None or eps is None or getattr(norm, "bias", None) is not None:
        return False
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, weight.shape[0], generator=generator) + 1).to(weight.device, weight.dtype)
    wide = x.float()
    expected = weight.float() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return torch.allclose(norm(x).float(), expected, rtol=2e-2, atol=1e-2)


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data.copy_(value)
