"""Options that a backbone does not have, refused in its own words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

Built = TypeVar("Built")
PLACEMENT = ("device", "dtype")


def built(make: Callable[..., Built], spec: str, source: Any, **options: Any) -> Built:
    """``make(source, **options)``.

    Args:
        make: a backbone's class.
        spec: how the message names the backbone.
        source: its first argument, which is no option.
        options: the others.

    Raises:
        ValueError: an option that it does not take; the message lists those that it takes.
    """
    try:
        return make(source, **options)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in options:
            raise
        _, *parameters = inspect.signature(make).parameters.values()
        named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in PLACEMENT]
        raise ValueError(
            f"backbone {spec!r} takes no option {unknown[1]}; it takes {', '.join(named) or 'none'}"
        ) from error
