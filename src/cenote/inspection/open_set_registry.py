"""Open-set scores by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cenote.inspection.open_set_base import OpenSetScore
from cenote.inspection.open_set_files import read_config

_FILES = {
    "costarr": "open_set:CoStarr",
    "msp": "open_set_logits:MSP",
    "maxlogit": "open_set_logits:MaxLogit",
    "energy": "open_set_logits:Energy",
    "knn": "open_set_neighbours:KNN",
    "nnguide": "open_set_neighbours:NNGuide",
    "vim": "open_set_vim:ViM",
    "ghost": "open_set_ghost:GHOST",
    "postmax": "open_set_postmax:PostMax",
}


class _Scores(Mapping[str, type[OpenSetScore]]):
    """Name to class, each imported when asked for."""

    def __getitem__(self, name: str) -> type[OpenSetScore]:
        module, _, cls = _FILES[name].partition(":")
        return getattr(importlib.import_module(f"cenote.inspection.{module}"), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(_FILES)

    def __len__(self) -> int:
        return len(_FILES)


OPEN_SET_SCORES: Mapping[str, type[OpenSetScore]] = _Scores()


def open_set_score_class(name: str) -> type[OpenSetScore]:
    """The class of a name; ``ValueError`` suggesting the nearest if there is none."""
    if name not in OPEN_SET_SCORES:
        near = difflib.get_close_matches(name, list(OPEN_SET_SCORES), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown open-set score {name!r}: there are {', '.join(OPEN_SET_SCORES)}{hint}")
    return OPEN_SET_SCORES[name]


def create_open_set_score(name: str, head: nn.Module, **options: Any) -> OpenSetScore:
    """A score by name on a classifier's last linear layer, not yet fitted.

    Args:
        name: one of :data:`OPEN_SET_SCORES`.
        head: a linear layer, or a classifier that ends in one; see :meth:`OpenSetScore.from_head`.
        **options: of the score.

    Raises:
        ValueError: an unknown name (the nearest is suggested), or a head that is not linear.
        TypeError: an option that the score does not have.
    """
    return open_set_score_class(name).from_head(head, **options)


def load_open_set_score(folder: str | Path) -> OpenSetScore:
    """Read a folder written by :meth:`OpenSetScore.save_pretrained`, whichever the method."""
    return open_set_score_class(read_config(folder)["method"]).from_pretrained(folder)
