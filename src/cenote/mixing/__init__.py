"""Tokens to tokens; one file a method."""

from typing import Any

from cenote.mixing.base import MapMixer, Mixer, MixerContext, RecurrentMixer
from cenote.mixing.metaformer import MetaFormer, MetaFormerBlock
from cenote.mixing.registry import create_mixer, expand_pattern, list_mixers

__all__ = [
    "MapMixer",
    "MetaFormer",
    "MetaFormerBlock",
    "Mixer",
    "MixerContext",
    "RecurrentMixer",
    "create_mixer",
    "expand_pattern",
    "list_mixers",
    "replace_mixer",
]


def __getattr__(name: str) -> Any:
    if name == "replace_mixer":  # knows hosts, so it lives with the integrations
        from cenote.integrations.replace_mixer import replace_mixer

        return replace_mixer
    raise AttributeError(f"module 'cenote.mixing' has no attribute {name!r}")
