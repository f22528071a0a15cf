"""What a probe compares: readouts x layers x tokens, each with its defaults and its grid of learning rates."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cenote.pooling import create_pooling, list_poolings
from cenote.pooling.base import Pooling
from cenote.pooling.registry import pooling_class
from cenote.probe.heads import Member
from cenote.types import Grid, TokenChoice

LINEAR_LRS = (1e-2, 3e-2, 1e-1)
QUERY_LRS = (1e-2, 3e-2, 1e-1)
QUERY_FACTORS = (1.0, 10.0)
BLOCK_LRS = (1e-3, 3e-3, 1e-2)

COMPOSED = (
    "mean_layers > mean",
    "weighted_layers > mean",
    "weighted_layers > efficient_probing",
    "concat_layers > mean",
)
BLOCKS = (
    "abmilp",
    "cait",
    "cbam",
    "clip",
    "coca",
    "dinovit",
    "dolg",
    "histograph",
    "jepa",
    "l_tdnn",
    "siglip",
    "latent_attention",
    "latent_pooling",
    "multi_layer_pooling",
)
HEADS = {"simpool": 1, "esimpool": 12, "aim": 16, "jepa": 16, "cait": 4, "clip": 4, "histograph": 4}
CLASS_ONLY = ("cls",)
EXTRAS = ("knn", "encoder_pooler")
"""Rows of the table that are no poolings."""
GROUPS = ("all", "last", "free")
"""Words that stand for several readouts."""


@dataclass(frozen=True)
class Host:
    """What a candidate must know of the backbone and the stored tokens.

    Attributes:
        dim: token width.
        layers: hidden states in the store, in order.
        grid: patch grid, or ``None``.
        prefix: prefix tokens in the store.
        modality: ``"image"``, ``"text"``, ``"audio"`` or ``"graph"``.
        uniform: whether all items have the same number of tokens.
    """

    dim: int
    layers: tuple[int, ...]
    grid: Grid | None
    prefix: int
    modality: str
    uniform: bool


@dataclass(frozen=True)
class Candidate:
    """One line of the comparison.

    Attributes:
        readout: pooling spec.
        layers: hidden states it reads.
        tokens: which tokens it reads.
        options: constructor options of the pooling beyond ``dim``.
        members: learning rates x query factors x seeds; empty for a pooling without parameters.
    """

    readout: str
    layers: tuple[int, ...]
    tokens: TokenChoice
    options: tuple[tuple[str, Any], ...]
    members: tuple[Member, ...]

    def make(self, dim: int) -> Pooling:
        """A fresh pooling."""
        return create_pooling(self.readout, dim=dim, **dict(self.options))

    @property
    def reads_stack(self) -> bool:
        """Whether the pooling takes the whole layer axis."""
        return reads_stack(self.readout)

    @property
    def key(self) -> str:
        """Unique name, as in :meth:`cenote.probe.result.ProbeResult.key`."""
        return f"{self.readout} | {','.join(map(str, self.layers))} | {self.tokens}"


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of ``number`` that is not above ``at_most``."""
    return next(k for k in range(min(number, at_most), 0, -1) if number % k == 0)


def default_options(name: str, dim: int) -> dict[str, Any]:
    """Options that make a published default fit a width: heads, queries and groups must divide it."""
    wanted = {"num_heads": HEADS.get(name, 8), "num_groups": 12}
    if name == "efficient_probing":
        wanted["num_queries"] = 32
    parameters = inspect.signature(pooling_class(name)).parameters
    options: dict[str, Any] = {key: largest_divisor(dim, top) for key, top in wanted.items() if key in parameters}
    if name in ("coca", "latent_attention", "latent_pooling", "multi_layer_pooling"):
        # Published at language-model or ImageNet scale; sized here to the width they read.
        sizes = {"num_latents": 8, "head_dim": max(8, dim // 8), "dim_head": 64, "num_queries": 1, "num_heads": 8}
        options = {key: value for key, value in sizes.items() if key in parameters}
    if name == "l_tdnn":
        # A tenth of the published width, and no dropout, which the few epochs of a probe have no use for.
        options = {"conv_dim": 32, "hidden_size": 64, "num_heads": 4, "pool_dim": 64, "se_channels": 16, "dropout": 0.0}
    return options


def plan(
    readouts: str | Sequence[str],
    host: Host,
    num_layers: int,
    layers: Sequence[int],
    tokens: str | Sequence[str],
    seeds: int,
    lrs: Sequence[float] | None,
    query_factors: Sequence[float] | None,
) -> list[Candidate]:
    """Every candidate of a probe.

    Args:
        readouts: ``"all"``, ``"last"`` (those that read one layer), ``"free"`` (no parameters), names or compositions.
        host: the stored tokens.
        num_layers: blocks of the backbone.
        layers: hidden states at which one-layer readouts are compared; stack readouts read all of ``host.layers``.
        tokens: ``"auto"`` or choices among class, patches, both.
        seeds, lrs, query_factors: the grid; ``None`` takes each readout's own.

    Raises:
        ValueError: unknown readout (nearest names suggested), or one that this backbone cannot feed, by name.
    """
    named = not (isinstance(readouts, str) and readouts in GROUPS)
    specs = split_specs(readouts) if named else group(str(readouts), host.modality, len(host.layers) > 1)
    extras, specs = [s for s in specs if s in EXTRAS], [s for s in specs if s not in EXTRAS]
    candidates: list[Candidate] = []
    for spec in specs:
        problem = unfit(spec, host)
        if problem:
            if named:
                raise ValueError(f"{spec}: {problem}")
            continue
        candidates += _expand(spec, host, layers, tokens, seeds, lrs, query_factors)
    unique = list({candidate.key: candidate for candidate in candidates}.values())
    if readouts == "free":
        unique = [candidate for candidate in unique if not candidate.members]
    if not unique and not extras:
        raise ValueError("nothing to compare: no readout fits this backbone and token choice")
    return unique


def split_specs(readouts: str | Sequence[str]) -> list[str]:
    """``"mean, efficient_probing(num_queries=8)"`` to a list; commas inside parentheses do not separate."""
    if not isinstance(readouts, str):
        return list(readouts)
    parts, depth, current = [], 0, ""
    for character in readouts:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part.strip() for part in [*parts, current] if part.strip()]


def _base_name(spec: str) -> str:
    return spec.split(">")[-1].split("(")[0].strip()


def reads_stack(spec: str) -> bool:
    """Whether a readout reads several layers."""
    return ">" in spec or pooling_class(_base_name(spec)).layers == "all"


def reads_embeddings(spec: str) -> bool:
    """Whether a readout of several layers wants hidden state 0 among them."""
    return ">" not in spec and pooling_class(_base_name(spec)).reads_embeddings


def group(name: str, modality: str, stack: bool = True) -> list[str]:
    """The readouts behind ``"all"``, ``"last"`` or ``"free"`` that were made for a modality."""
    names = [n for n in list_poolings() if modality in (pooling_class(n).modalities or (modality,))]
    if name == "last":
        return [n for n in names if not reads_stack(n)]
    return [*names, *(COMPOSED if stack else ())]


def unfit(spec: str, host: Host) -> str | None:
    """Why this backbone cannot feed a readout, or ``None``."""
    name = _base_name(spec)
    cls = pooling_class(name)
    if name in CLASS_ONLY and host.prefix < 1:
        return "the backbone has no class token"
    if cls.needs_grid and (host.grid is None or not host.uniform):
        return "it needs a patch grid, and this backbone gives sequences"
    if reads_stack(spec) and len(host.layers) < 2:
        return "it reads several layers, and only one is extracted"
    return None


def _expand(
    spec: str,
    host: Host,
    layers: Sequence[int],
    tokens: str | Sequence[str],
    seeds: int,
    lrs: Sequence[float] | None,
    query_factors: Sequence[float] | None,
) -> list[Candidate]:
    """A readout at each layer (or over the stack) and each token choice."""
    name = _base_name(spec)
    stack = reads_stack(spec)
    cls = pooling_class(name)
    choices: list[TokenChoice] = _token_choices(name, host, tokens, cls.needs_grid)
    # Hidden state 0 is stored for the readouts that want it; the others see it only if it was asked for.
    all_layers = host.layers if reads_embeddings(spec) or 0 in layers else tuple(n for n in host.layers if n > 0)
    layer_sets = [all_layers] if stack else [(layer,) for layer in layers]
    found = []
    for chosen in layer_sets:
        width = host.dim * len(chosen) if "concat_layers" in spec else host.dim
        given = _inline_names(spec)
        options = {key: value for key, value in default_options(name, width).items() if key not in given}
        if stack:
            options["num_layers"] = len(chosen)
        if cls.needs_grid and host.grid is not None:
            options["grid"] = tuple(host.grid)
        pooling = create_pooling(spec, dim=host.dim, **options)
        members = _members(name, pooling, seeds, lrs, query_factors)
        found += [Candidate(spec, chosen, choice, tuple(sorted(options.items())), members) for choice in choices]
    return found


def _inline_names(spec: str) -> set[str]:
    last = spec.split(">")[-1]
    if "(" not in last:
        return set()
    return {
        piece.split("=")[0].strip() for piece in last[last.index("(") + 1 : last.rindex(")")].split(",") if "=" in piece
    }


def _token_choices(name: str, host: Host, tokens: str | Sequence[str], needs_grid: bool) -> list[TokenChoice]:
    if name in CLASS_ONLY:
        return ["class"]
    if tokens == "auto":
        return ["patches"] if host.modality == "image" else ["both"]
    wanted = [tokens] if isinstance(tokens, str) else list(tokens)
    for choice in wanted:
        if choice not in ("class", "patches", "both"):
            raise ValueError(f"tokens must be 'auto', 'class', 'patches' or 'both', got {choice!r}")
        if choice == "class" and host.prefix < 1:
            raise ValueError("this backbone has no class token: choose tokens='patches' or 'both'")
    if needs_grid:
        return ["patches"]
    # One token makes every token readout the same as cls.
    return [choice for choice in wanted if choice != "class"]  # type: ignore[misc]


def _members(
    name: str, pooling: Pooling, seeds: int, lrs: Sequence[float] | None, query_factors: Sequence[float] | None
) -> tuple[Member, ...]:
    """The grid of a readout: learning rates x query factors x seeds, or nothing where there is nothing to learn."""
    if not any(True for _ in pooling.parameters()):
        return ()
    has_queries = bool(pooling.query_parameters)
    if lrs is None:
        lrs = BLOCK_LRS if name in BLOCKS else QUERY_LRS if has_queries else LINEAR_LRS
    factors = (1.0,) if not has_queries else QUERY_FACTORS if query_factors is None else query_factors
    return tuple(Member(lr, factor, seed) for lr in lrs for factor in factors for seed in range(seeds))
