"""Recipes by name: ``create_recipe("tidal_decode(top_k=256)")``."""

from __future__ import annotations

import importlib
from typing import Any

from cenote.attention.base import Recipe
from cenote.specs import check_options, parse_spec, unknown_name

_FILES = {
    "block_heuristic": "block_heuristic:BlockHeuristic",
    "echo_att": "echo_att:EchoAtt",
    "h2o": "h2o:H2O",
    "hylra": "hylra:HyLRA",
    "quest": "quest:Quest",
    "seer_attention": "seer_attention:SeerAttention",
    "seer_decode": "seer_decode:SeerDecode",
    "tidal_decode": "tidal_decode:TidalDecode",
    "window": "window:Window",
    "visual_attention_redistribution": "visual_attention_redistribution:VisualAttentionRedistribution",
}


_DIFFUSION = {"rectified_spaattn": "rectified_spaattn:RectifiedSpaAttn"}
"""Recipes for diffusion transformers, which no text decoder can take."""


def list_recipes() -> list[str]:
    """Names that :func:`create_recipe` knows of recipes for text decoders."""
    return sorted(_FILES)


def recipe_class(name: str) -> type[Recipe]:
    """The class behind a recipe's name; ``ValueError`` with the nearest names if there is none."""
    known = {**_FILES, **_DIFFUSION}
    if name not in known:
        raise unknown_name("recipe", name, known)
    file, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(f"cenote.attention.{file}"), attribute)


def create_recipe(spec: str, **options: Any) -> Recipe:
    """Build a recipe from its name, optionally with options: ``"window(tokens=256)"``.

    Raises:
        ValueError: unknown name (nearest names suggested), malformed spec, an option that the recipe does not take.
    """
    name, inline = parse_spec(spec)
    kind = recipe_class(name)
    check_options(name, kind, {**options, **inline})
    return kind(**{**options, **inline})
