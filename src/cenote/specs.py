"""Names with options, as users write them: ``"ponet"``, ``"pooling(pool_size=5)"``."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """``"gem(p=3)"`` to ``("gem", {"p": 3})``; only literals are read.

    Raises:
        ValueError: the text is no name with options.
    """
    spec = spec.strip()
    try:
        node = ast.parse(spec, mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and not node.args
            and all(k.arg for k in node.keywords)
            and len({k.arg for k in node.keywords}) == len(node.keywords)
        ):
            return node.func.id, {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"cannot read {spec!r}: write a name such as 'mean' or 'efficient_probing(num_queries=8)'")


def unknown_name(kind: str, name: str, known: Iterable[str], listed: Iterable[str] | None = None) -> ValueError:
    """The error for a name that nothing has: the nearest names, or all ``listed`` ones where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(sorted(listed or known))}"
    return ValueError(f"unknown {kind} {name!r}; {hint}")


def accepted(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Those options that the constructor of ``cls`` takes, its width ``dim`` left out."""
    parameters = inspect.signature(cls).parameters
    return {key: value for key, value in options.items() if key in parameters and key != "dim"}


def check_options(name: str, cls: Callable[..., Any], options: Iterable[str]) -> None:
    """Raise ``ValueError`` with the signature where ``cls`` does not take one of the options.

    Its width ``dim`` is no option: whoever builds it gives that. A class that takes ``**options`` looks at them itself.
    """
    parameters = inspect.signature(cls).parameters
    unknown = set(options) - (set(parameters) - {"dim"})
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        unknown &= {"dim"}
    if unknown:
        raise ValueError(f"{name} takes no option(s) {', '.join(sorted(unknown))}; it takes {inspect.signature(cls)}")
