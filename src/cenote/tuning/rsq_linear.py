"""One quantised linear layer as it is kept, written and read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cenote.ops.bit_packing import pack_codes, unpack_codes
from cenote.ops.quantizer import QuantizedWeight, even_groups


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes, scales and zero points of a linear layer, packed.

    Attributes:
        name: of the layer in its model.
        packed: codes, ``(rows, ceil(columns / 8) * bits)`` bytes, see :func:`cenote.ops.bit_packing.pack_codes`.
        columns: of the weight.
        scale: ``(rows, groups)`` in the model's own type.
        zero: ``(rows, groups)`` uint8 codes that stand for 0, or ``None`` for ``2^(bits-1)`` everywhere (symmetric).
        group: ``(columns,)`` int32 group of each column, or ``None`` for runs of neighbours.
        bits: of a code.
        error: share of the output's (weighted) energy that is wrong; of the weight's energy for round-to-nearest.
        damping_steps: how often the Hessian's damping was added.
    """

    name: str
    packed: Tensor
    columns: int
    scale: Tensor
    zero: Tensor | None
    group: Tensor | None
    bits: int
    error: float
    damping_steps: int

    @classmethod
    def pack(
        cls, name: str, weight: QuantizedWeight, dtype: torch.dtype, error: float, damping_steps: int
    ) -> QuantizedLinear:
        """From the codes of a weight; scales become ``dtype``, those of a grid fitted in that type unchanged."""
        columns, groups = weight.codes.shape[1], weight.scale.shape[1]
        symmetric = bool((weight.zero == 2 ** (weight.bits - 1)).all())
        even = columns % groups == 0 and torch.equal(weight.group.cpu(), even_groups(columns, columns // groups))
        return cls(
            name,
            pack_codes(weight.codes.cpu(), weight.bits),
            columns,
            weight.scale.to("cpu", dtype),
            None if symmetric else weight.zero.to("cpu", torch.uint8),
            None if even else weight.group.to("cpu", torch.int32),
            weight.bits,
            error,
            damping_steps,
        )

    def unpack(self) -> QuantizedWeight:
        """The codes, one a byte, with float32 scales and zero points."""
        scale = self.scale.float()
        zero = torch.full_like(scale, 2 ** (self.bits - 1)) if self.zero is None else self.zero.float()
        group = even_groups(self.columns, self.columns // scale.shape[1]) if self.group is None else self.group.long()
        return QuantizedWeight(unpack_codes(self.packed, self.bits, self.columns), scale, zero, group, self.bits)

    def dequantize(self) -> Tensor:
        """The weight ``(rows, columns)`` in the type of the scales."""
        return self.unpack().dequantize().to(self.scale.dtype)

    @property
    def rows(self) -> int:
        return len(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and groups."""
        return sum(part.nbytes for part in (self.packed, self.scale, self.zero, self.group) if part is not None)


_PARTS = ("packed", "scale", "zero", "group")


def linears_to_tensors(
    linears: Iterable[QuantizedLinear], parts: tuple[str, ...] = _PARTS
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors ``<name>.packed``, ``.scale``, ``.zero``, ``.group`` (the last two where needed), and the rest."""
    tensors, facts = {}, {}
    for linear in linears:
        for part in parts:
            if (value := getattr(linear, part)) is not None:
                tensors[f"{linear.name}.{part}"] = value.contiguous()
        facts[linear.name] = {
            "rows": linear.rows,
            "columns": linear.columns,
            "bits": linear.bits,
            "error": linear.error,
            "damping_steps": linear.damping_steps,
        }
    return tensors, facts


def linears_from_tensors(tensors: dict[str, Tensor], facts: dict[str, dict[str, Any]]) -> list[QuantizedLinear]:
    """Undo :func:`linears_to_tensors`.

    Raises:
        ValueError: a tensor is missing.
    """
    linears = []
    for name, fact in facts.items():
        parts = {part: tensors.get(f"{name}.{part}") for part in _PARTS}
        packed, scale = parts["packed"], parts["scale"]
        if packed is None or scale is None:
            raise ValueError(f"expected tensors {name}.packed and {name}.scale, and found one missing")
        linears.append(
            QuantizedLinear(
                name,
                packed,
                fact["columns"],
                scale,
                parts["zero"],
                parts["group"],
                fact["bits"],
                fact["error"],
                fact["damping_steps"],
            )
        )
    return linears
