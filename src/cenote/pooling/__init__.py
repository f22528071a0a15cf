"""Tokens and layers to one vector; one file a method."""

from cenote.pooling.base import Pooling
from cenote.pooling.registry import create_pooling, list_layer_reductions, list_poolings

__all__ = ["Pooling", "create_pooling", "list_layer_reductions", "list_poolings"]
