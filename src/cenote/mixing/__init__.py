"""Tokens to tokens; one file a method."""

from cenote.mixing.base import MapMixer, Mixer, MixerContext, RecurrentMixer
from cenote.mixing.metaformer import MetaFormer, MetaFormerBlock
from cenote.mixing.registry import create_mixer, expand_pattern, list_mixers
from cenote.mixing.replace import replace_mixer

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
