"""Which layers of a decoder work out what to attend to, and which take it over from an earlier one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

Role = Literal["full", "select", "reuse"]


@dataclass(frozen=True)
class LayerPlan:
    """One role a layer: ``"full"``, ``"select"``, or the number of the earlier layer whose result it reuses.

    A *full* layer attends to everything, a *select* layer works out what matters, a *reuse* layer takes that over from
    its source. What is taken over is the method's matter: positions (TidalDecode, HyLRA) or whole attention
    distributions (EchoAtt, whose sources are full layers).

    Args:
        roles: of the layers in order.

    Raises:
        ValueError: an unknown role, or a source that is no earlier layer, or itself reuses.
    """

    roles: tuple[str | int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(self.roles))
        for layer, role in enumerate(self.roles):
            if isinstance(role, bool) or not (isinstance(role, int) or role in ("full", "select")):
                raise ValueError(f"layer {layer}: a role is 'full', 'select' or a layer's number, got {role!r}")
            if isinstance(role, int):
                if not 0 <= role < layer:
                    raise ValueError(f"layer {layer} reuses layer {role}, which is no earlier layer")
                if isinstance(self.roles[role], int):
                    raise ValueError(f"layer {layer} reuses layer {role}, which itself reuses {self.roles[role]}")

    @classmethod
    def from_selectors(cls, num_layers: int, full: Iterable[int], select: Iterable[int]) -> LayerPlan:
        """Every layer that is neither full nor selecting reuses the nearest selecting layer before it.

        Raises:
            ValueError: numbers that are no layers, or twice, or nothing to reuse yet.
        """
        full, select = list(full), list(select)
        wrong = [layer for layer in full + select if not 0 <= layer < num_layers]
        if wrong or len({*full, *select}) != len(full) + len(select):
            raise ValueError(f"full {full} and select {select} must be different layers of 0 to {num_layers - 1}")
        roles: list[str | int] = []
        for layer in range(num_layers):
            if layer in full:
                roles.append("full")
            elif layer in select:
                roles.append("select")
            else:
                before = [each for each in select if each < layer]
                if not before:
                    raise ValueError(f"layer {layer} would reuse, but no layer before it selects")
                roles.append(max(before))
        return cls(tuple(roles))

    @classmethod
    def from_shared(cls, num_layers: int, shared: Iterable[int]) -> LayerPlan:
        """Shared layers copy from the nearest earlier layer that is not shared; all others are full.

        Raises:
            ValueError: layer 0 shared, numbers that are no layers, or twice.
        """
        shared = list(shared)
        wrong = [layer for layer in shared if not 0 < layer < num_layers]
        if wrong or len(set(shared)) != len(shared):
            raise ValueError(f"shared layers must be different ones of 1 to {num_layers - 1}, got {shared}")
        roles: list[str | int] = []
        for layer in range(num_layers):
            if layer in shared:
                roles.append(max(each for each in range(layer) if each not in shared))
            else:
                roles.append("full")
        return cls(tuple(roles))

    def __len__(self) -> int:
        return len(self.roles)

    def role(self, layer: int) -> Role:
        """The layer's role by name."""
        role = self.roles[layer]
        return "reuse" if isinstance(role, int) else cast(Role, role)

    def source(self, layer: int) -> int:
        """Whose result the layer uses: a reusing layer's source, otherwise itself."""
        role = self.roles[layer]
        return role if isinstance(role, int) else layer

    def layers(self, role: Role) -> tuple[int, ...]:
        """Numbers of the layers with this role."""
        return tuple(layer for layer in range(len(self)) if self.role(layer) == role)

    def followers(self, source: int) -> tuple[int, ...]:
        """The layers that reuse this one."""
        return tuple(layer for layer, role in enumerate(self.roles) if role == source and isinstance(role, int))

    def check(self, num_layers: int, sources: Sequence[Role] = ("select",)) -> None:
        """Raise ``ValueError`` unless the plan has so many layers and reuses only layers of these roles."""
        if len(self) != num_layers:
            raise ValueError(f"the plan is for {len(self)} layers, the model has {num_layers}")
        for layer in self.layers("reuse"):
            if self.role(self.source(layer)) not in sources:
                kinds = " or ".join(sources)
                raise ValueError(f"layer {layer} reuses layer {self.source(layer)}, which is not a {kinds} layer")
