"""Mixers by name: ``create_mixer("ponet", dim=256, num_heads=4)``, and patterns of them for the layers of a stack."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from cenote.mixing.base import Mixer
from cenote.specs import accepted, check_options, parse_spec, unknown_name

_FILES = {
    "delta_rule": "regression_rules:DeltaRule",
    "fixed_attention": "fixed_attention:FixedAttention",
    "gated_delta": "regression_rules:GatedDelta",
    "gated_delta_product": "regression_rules:GatedDeltaProduct",
    "halo_attention": "halo_attention:HaloAttention",
    "identity": "identity:Identity",
    "kernel_ridge": "regression_rules:KernelRidge",
    "key_softmax": "key_softmax:KeySoftmax",
    "linear_attention": "regression_rules:LinearAttention",
    "local_constant": "regression_rules:LocalConstant",
    "local_linear": "regression_rules:LocalLinear",
    "longhorn": "regression_rules:Longhorn",
    "mini_batch": "regression_rules:MiniBatch",
    "momentum": "regression_rules:Momentum",
    "nlms": "regression_rules:NLMS",
    "parallax": "regression_rules:Parallax",
    "ponet": "ponet:PoNet",
    "ponet_lra": "ponet:PoNetLRA",
    "pool": "pool:Pool",
    "random_matrix": "random_matrix:RandomMatrix",
    "retention": "regression_rules:Retention",
    "ridge": "regression_rules:Ridge",
    "scalar_decay": "regression_rules:ScalarDecay",
    "softmax_attention": "softmax_attention:SoftmaxAttention",
    "spatial_fc": "spatial_fc:SpatialFC",
    "static_attention": "static_attention:StaticAttention",
    "tap": "tap:TAP",
    "taylor2": "regression_rules:Taylor2",
    "taylor_attention": "taylor_attention:TaylorAttention",
    "test_time_regression": "test_time_regression:TestTimeRegression",
    "titans_mlp": "regression_rules:TitansMLP",
    "token_mlp": "mlp:TokenMLP",
    "ttt_mlp": "regression_rules:TTTMLP",
    "vector_decay": "regression_rules:VectorDecay",
}


def list_mixers() -> list[str]:
    """Names that :func:`create_mixer` knows."""
    return sorted(_FILES)


def mixer_class(name: str) -> type[Mixer]:
    """The class behind a mixer's name; ``ValueError`` with the nearest names if there is none."""
    if name not in _FILES:
        raise unknown_name("mixer", name, _FILES)
    file, _, attribute = _FILES[name].partition(":")
    return getattr(importlib.import_module(f"cenote.mixing.{file}"), attribute)


def create_mixer(spec: str, *, dim: int, defaults: Mapping[str, Any] | None = None, **options: Any) -> Mixer:
    """Build a mixer from its name.

    Args:
        spec: a name of :func:`list_mixers`, optionally with options: ``"pooling(pool_size=5)"``.
        dim: token width.
        defaults: options that are used where the mixer takes them and its own spec says nothing, for stacks of
            different mixers.
        **options: options that the mixer must take.

    Raises:
        ValueError: unknown name (nearest names suggested), malformed spec, an option that the mixer does not take.
    """
    name, inline = parse_spec(spec)
    cls = mixer_class(name)
    check_options(name, cls, {**options, **inline})
    return cls(dim, **{**accepted(cls, dict(defaults or {})), **options, **inline})


def expand_pattern(pattern: str | Sequence[str], depth: int) -> tuple[str, ...]:
    """One mixer spec a layer from a pattern that is repeated until ``depth`` layers have one.

    ``"softmax_attention"`` is the same everywhere, ``"delta_rule*2, softmax_attention"`` makes every third layer
    softmax attention; ``"identity*11, softmax_attention"`` only the last of twelve. A list of specs works alike.

    Raises:
        ValueError: an empty pattern, more specs than layers, or a repetition below 1.
    """
    parts = _split(pattern) if isinstance(pattern, str) else list(pattern)
    specs: list[str] = []
    for part in parts:
        spec, star, times = part.rpartition("*")
        repeated = star and times.strip().isdigit()
        if repeated and int(times) < 1:
            raise ValueError(f"a mixer is repeated at least once, got {part.strip()!r}")
        specs += [spec.strip()] * int(times) if repeated else [part.strip()]
    if not specs or not all(specs):
        raise ValueError(
            f"a pattern is one or more mixer names, such as 'delta_rule*2, softmax_attention': {pattern!r}"
        )
    if len(specs) > depth:
        raise ValueError(f"the pattern {pattern!r} names {len(specs)} mixers for {depth} layer(s)")
    return tuple(specs[layer % len(specs)] for layer in range(depth))


def _split(pattern: str) -> list[str]:
    """Parts between the commas that stand outside brackets."""
    parts, level = [""], 0
    for character in pattern:
        level += (character in "([{") - (character in ")]}")
        if character == "," and level == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
