"""One budget for all methods: the share of keys, tokens or bits that is kept, in each method's own settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Settings = Callable[[float, int, int], dict[str, Any]]
"""Of a budget, the tokens of a row and the tokens of the longest one, which sizes of blocks go by."""


def _tokens(budget: float, tokens: int) -> int:
    return max(1, round(budget * tokens))


def _block(longest: int) -> int:
    """Blocks of 64 as published, smaller ones where a context has too few of them."""
    return next((size for size in (64, 32, 16) if longest >= 64 * size), 8)


def _pages(budget: float, tokens: int, longest: int) -> dict[str, Any]:
    page = min(16, _block(longest))
    return {"page_size": page, "budget": page * max(1, round(_tokens(budget, tokens) / page))}


def _chunks(budget: float, tokens: int, longest: int) -> dict[str, Any]:
    size = _block(longest)
    keep = max(2, round(_tokens(budget, tokens) / size))
    first = min(1, keep - 2)
    return {
        "chunk_size": size, "top_k": keep * size, "first": first, "last": max(1, min(4, (keep - first) // 2)),
        "threshold": 0,
    }  # fmt: skip


def _gated(budget: float, tokens: int, longest: int) -> dict[str, Any]:
    """The first and the last block come on top of a decoding gate's own choice."""
    size = _block(longest)
    return {"block_size": size, "token_budget": size * max(1, round(_tokens(budget, tokens) / size) - 2)}


def _bits(budget: float, tokens: int, longest: int) -> dict[str, Any]:
    return {"bits": min(8, max(2, round(16 * budget)))}


SETTINGS: dict[str, Settings] = {
    "window": lambda budget, tokens, _: {"budget": max(5, _tokens(budget, tokens))},
    "h2o": lambda budget, tokens, _: {"budget": max(2, _tokens(budget, tokens))},
    "quest": _pages,
    "tidal_decode": lambda budget, tokens, _: {"budget": _tokens(budget, tokens)},
    "hylra": _chunks,
    "seer_attention": lambda budget, _, longest: {"nz_ratio": budget, "block_size": _block(longest)},
    "seer_decode": _gated,
    "block_heuristic": lambda budget, _, longest: {"nz_ratio": budget, "block_size": _block(longest)},
    "echo_att": lambda *_: {"ratio": 0.25},
    "rsq": _bits,
    "gptq": _bits,
    "rtn": _bits,
}
"""A method that is not here runs with its own defaults."""


def settings(method: str, budget: float | None, tokens: int, longest: int) -> dict[str, Any]:
    """What a method is given for this budget in rows of so many tokens."""
    return SETTINGS[method](1.0 if budget is None else budget, tokens, longest) if method in SETTINGS else {}


def follows_budget(method: str, given: dict[str, Any]) -> bool:
    """Whether another budget changes a setting that the user has not given."""
    low, high = settings(method, 0.1, 4096, 4096), settings(method, 0.5, 4096, 4096)
    return any(low[key] != high[key] for key in low if key not in given)
