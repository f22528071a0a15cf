"""A name for a function that is the same whenever it computes the same."""

from __future__ import annotations

import functools
import hashlib
from types import CodeType, FunctionType
from typing import Any

from torch import nn


def identify(function: Any) -> str:
    """A string that changes when the function does, for use in a cache key.

    An attribute ``cache_id`` is taken at its word. Otherwise: a Python function is named by its module, its bytecode,
    defaults and enclosed values (functions that it calls are known by name only); ``functools.partial`` by its parts;
    any other object, such as a torchvision transform, by its ``repr``.

    Raises:
        ValueError: nothing tells the object from another one: a ``repr`` with a memory address, a module with weights.
    """
    named = getattr(function, "cache_id", None)
    if named is not None:
        return str(named)
    if isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        parts = [_code(function.__code__), *map(_value, [function.__defaults__, function.__kwdefaults__, *cells])]
        return f"{function.__module__}.{function.__qualname__}:{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    return _value(function)


def _value(value: Any) -> str:
    if isinstance(value, FunctionType) or getattr(value, "cache_id", None) is not None:
        return identify(value)
    if isinstance(value, functools.partial):
        return f"partial({_value(value.func)}, {_value(value.args)}, {_value(value.keywords)})"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_value(v)}' for k, v in value.items())}}}"
    weights = isinstance(value, nn.Module) and any(True for _ in (*value.parameters(), *value.buffers()))
    text = repr(value)
    if weights or " at 0x" in text or "<lambda>" in text or "..." in text:
        raise ValueError(
            f"cannot tell {type(value).__name__} from another one for the feature cache: "
            "give it an attribute cache_id that changes with what it computes"
        )
    return text


def _code(code: CodeType) -> str:
    inner = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return repr((code.co_code.hex(), code.co_names, code.co_varnames, inner))
