"""Values that depend on parameters alone, kept between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

T = TypeVar("T")


def _version(parameter: Tensor) -> tuple[Any, ...]:
    return parameter._version, parameter.data_ptr(), parameter.dtype


class ConstantCache:
    """Keeps what was computed from parameters until any of them changes.

    A change is seen by the parameter's identity, version counter, storage and dtype. Writing through ``parameter.data``
    goes unseen until :meth:`clear`, so an owner clears in ``train``. A copy or pickle of the owner starts empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._entries: dict[str, tuple[list[tuple[Tensor, tuple[Any, ...]]], Any]] = {}

    @staticmethod
    def allowed(parameters: Sequence[Tensor]) -> bool:
        """Whether a value may outlive this call: real parameters, outside of tracing, with no graph to record."""
        if torch.compiler.is_compiling():
            return False
        # Under functional_call and vmap the owner holds stand-ins that are not parameters.
        if not all(isinstance(p, nn.Parameter) and not p.is_inference() for p in parameters):
            return False
        return not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))

    def get(self, name: str, parameters: Sequence[Tensor], build: Callable[[], T]) -> T:
        """The kept value, or a new one made by ``build`` in the parameters' own precision."""
        seen, value = self._entries.get(name, ([], None))
        if len(seen) == len(parameters) and all(
            old is new and version == _version(new) for (old, version), new in zip(seen, parameters, strict=True)
        ):
            return value
        kind = parameters[0].device.type
        full_precision = torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext()
        # Not inference tensors, so that they also serve a later call that differentiates with respect to its input.
        with torch.inference_mode(False), torch.no_grad(), full_precision:
            value = build()
        self._entries[name] = ([(p, _version(p)) for p in parameters], value)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> ConstantCache:
        return ConstantCache()

    def __reduce__(self) -> tuple[type[ConstantCache], tuple[()]]:
        return ConstantCache, ()
