"""What each query looks at: test items and quantised attention, drawn by the page's script."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from cenote.probe.result import Gallery, ProbeResult
from cenote.report.words import short_names

MAX_READOUTS, MAX_ITEMS, MAX_QUERIES, MAX_SIDE = 10, 12, 64, 224


def gallery_data(result: ProbeResult) -> tuple[dict[str, Any] | None, list[str]]:
    """JSON-able contents of the gallery and notes on what was left out; ``None`` where nothing can be shown.

    ``{"kind": "image" | "text", "grid", "items", "readouts": [{"name", "queries", "tokens", "prefix", "entropy",
    "weights"}]}``. ``weights`` is the base64 text of bytes ``(items, 1 + queries, tokens)``: the mean over queries,
    then each query, scaled to 255 at its largest patch (or token). Prefix tokens come first; they do not take part in
    that scale.
    """
    items = result.gallery_items[:MAX_ITEMS]
    if not items or not result.galleries:
        return None, []
    image = result.gallery_grid is not None and isinstance(items[0], Image.Image)
    names = dict(zip(map(result.key, result.rows), short_names(result.rows), strict=True))
    by_readout = {row.readout: names[result.key(row)] for row in reversed(result.rows)}
    shown: list[dict[str, Any]] = []
    notes: list[str] = []
    for gallery in result.galleries:
        name = names.get(gallery.readout) or by_readout.get(gallery.readout) or gallery.readout
        prefix = _prefix(gallery, result) if image else 0
        if prefix is None:
            tokens, grid = gallery.weights.shape[2], result.gallery_grid
            notes.append(
                f"{name} attends to {tokens} tokens, which do not lie on the {grid} grid, so it is not in the gallery"
            )
        elif len(shown) < MAX_READOUTS:
            shown.append(_readout(name, gallery, len(items), prefix))
    if len(result.galleries) > MAX_READOUTS:
        notes.append(f"the gallery shows the {MAX_READOUTS} best of {len(result.galleries)} attentive readouts")
    if not shown:
        return None, notes
    contents = {
        "kind": "image" if image else "text",
        "grid": list(result.gallery_grid or ()),
        "items": [_image(item) if image else _tokens(item) for item in items],
        "readouts": shown,
    }
    return contents, notes


def _prefix(gallery: Gallery, result: ProbeResult) -> int | None:
    """Prefix tokens in front of the grid: as many as stated, or none (only patches read); ``None`` if neither fits."""
    height, width = result.gallery_grid or (0, 0)
    extra = gallery.weights.shape[2] - height * width
    return extra if extra in (0, result.gallery_prefix) else None


def _readout(name: str, gallery: Gallery, items: int, prefix: int) -> dict[str, Any]:
    order = np.argsort(np.nan_to_num(gallery.entropy, nan=np.inf), kind="stable")[:MAX_QUERIES]
    weights = np.asarray(gallery.weights[:items], dtype=np.float64)
    shown = np.concatenate([weights.mean(axis=1, keepdims=True), weights[:, order]], axis=1)
    return {
        "name": name,
        "queries": [int(q) for q in order],
        "total": int(weights.shape[1]),
        "tokens": int(weights.shape[2]),
        "prefix": prefix,
        "entropy": [round(float(gallery.entropy[q]), 3) if np.isfinite(gallery.entropy[q]) else None for q in order],
        "on_prefix": np.round(shown[..., :prefix].sum(axis=-1), 3).tolist(),
        "weights": base64.b64encode(quantise(shown, prefix).tobytes()).decode(),
    }


def quantise(weights: Float[np.ndarray, "items queries tokens"], prefix: int = 0) -> np.ndarray:
    """Weights as bytes, 255 at the largest token behind the prefix of each item and query."""
    largest = weights[..., prefix:].max(axis=-1, keepdims=True)
    return np.round(255 * np.clip(weights / np.maximum(largest, 1e-12), 0, 1)).astype(np.uint8)


def _image(image: Image.Image) -> dict[str, Any]:
    """A data URI: PNG where small or already lossless and tiny, JPEG for photographs."""
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    small = max(image.size) <= 64
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return {
        "src": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "width": image.width,
        "height": image.height,
    }


def _tokens(tokens: Sequence[str]) -> list[list[Any]]:
    """``[text, whether a space stands before it]`` for each token, without the marks of the tokenizer."""
    leading = any(token.startswith(("Ġ", "▁")) for token in tokens)
    found: list[list[Any]] = []
    for token in tokens:
        if leading:
            found.append(
                [token.replace("Ġ", "").replace("▁", "").replace("Ċ", "⏎") or " ", token.startswith(("Ġ", "▁"))]
            )
        else:
            found.append([token.removeprefix("##"), not token.startswith("##")])
    return found
