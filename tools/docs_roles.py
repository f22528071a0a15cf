"""For the documentation site: Sphinx roles in docstrings become plain code, and doubled backticks single ones."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|obj):`~?([^`]+)`")


def readable(text: str) -> str:
    """``:class:`~cenote.types.Features``` to ``Features``, in code font."""
    text = ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    return re.sub(r"``([^`\n]+)``", r"`\1`", text)


class Roles(griffe.Extension):
    """Applies :func:`readable` to every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
