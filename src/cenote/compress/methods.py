"""What is compared: recipes and weight methods behind one face, made ready for a model and a budget."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from cenote.attention.base import Recipe
from cenote.attention.host import Host
from cenote.attention.registry import list_recipes, recipe_class
from cenote.compress.budgets import follows_budget, settings
from cenote.compress.result import DENSE, WEIGHTS
from cenote.specs import check_options, parse_spec, unknown_name

UNFIT = {
    "visual_attention_redistribution": "it moves attention between the tokens of an image, and the inputs are text",
}
SAME_FOR_ALL_BUDGETS = ("seer_attention", "seer_decode")
"""Recipes whose calibration does not look at the budget."""
Batches = Sequence[Mapping[str, Tensor]]


@runtime_checkable
class Ready(Protocol):
    """A method that is ready to run.

    Attributes:
        spec: name and settings at the longest context.
        seconds: of calibration.
        note: what a reader must know.
    """

    @property
    def spec(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def note(self) -> str: ...

    def at(self, tokens: int) -> Any:
        """A block within which its model, which it gives, works in the method's way on rows of so many tokens."""

    def weight_bytes(self) -> int:
        """Of the weights as the method stores them."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what is needed to use the method at the longest context."""


@dataclass(frozen=True)
class Method:
    """A name with the options that the user gave.

    Attributes:
        spec: as given.
        name: of the recipe or weight method.
        options: given with it; they override what a budget says.
    """

    spec: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, spec: str) -> Method:
        """Read a name with options.

        Raises:
            ValueError: an unknown name (nearest names suggested) or an option that the method does not take.
        """
        name, options = parse_spec(spec)
        if name not in all_names():
            raise unknown_name("method", name, all_names())
        check_options(name, _weight_function(name) if name in WEIGHTS else recipe_class(name), options)
        return cls(spec.strip(), name, options)

    @property
    def scaled(self) -> bool:
        """Whether it depends on the budget."""
        return follows_budget(self.name, self.options)

    def ready(
        self, model: Any, calibration: Batches, budget: float | None, longest: int, seed: int,
        like: Ready | None = None,
    ) -> Ready:  # fmt: skip
        """Calibrate or quantise.

        Args:
            like: what was made ready before: the same method's learning is used again where it can be.

        Raises:
            ValueError, TypeError: the method does not fit the model or the settings do not.
        """
        if self.name in UNFIT:
            raise ValueError(UNFIT[self.name])
        begin = time.perf_counter()
        options = {**settings(self.name, budget, longest, longest), **self.options}
        if self.name in WEIGHTS:
            if self.name == "rsq":
                options.setdefault("seed", seed)
            batches = () if self.name == "rtn" else (list(calibration),)
            result = _weight_function(self.name)(copy.deepcopy(model), *batches, **options)
            return ReadyWeights(describe(self.name, options), time.perf_counter() - begin, result)
        if isinstance(like, ReadyRecipe) and like.method == self and self.name in SAME_FOR_ALL_BUDGETS:
            recipe, seconds = replace(like.recipe, **options), like.seconds
        else:
            recipe = recipe_class(self.name)(**options).calibrate(model, calibration)
            seconds = time.perf_counter() - begin
        with recipe(model):  # refuses here what it cannot serve
            pass
        note = str(getattr(recipe, "note", ""))
        return ReadyRecipe(describe(self.name, options), seconds, model, recipe, self, budget, longest, note)


@dataclass(frozen=True)
class ReadyRecipe:
    """A calibrated recipe; see :class:`Ready`."""

    spec: str
    seconds: float
    model: Any
    recipe: Recipe
    method: Method
    budget: float | None
    longest: int
    note: str = ""

    @contextmanager
    def at(self, tokens: int) -> Iterator[Any]:
        changed = {
            key: value
            for key, value in settings(self.method.name, self.budget, tokens, self.longest).items()
            if key not in self.method.options
        }
        with replace(self.recipe, **changed)(self.model):
            yield self.model

    def weight_bytes(self) -> int:
        return _bytes(self.model)

    def save(self, folder: str | os.PathLike[str]) -> None:
        self.recipe.save_pretrained(folder)


@dataclass(frozen=True)
class ReadyWeights:
    """A quantised copy of the model; see :class:`Ready`."""

    spec: str
    seconds: float
    result: Any
    note: str = "runs on the dequantised weights: its gain is in bytes, not in time"

    @contextmanager
    def at(self, tokens: int) -> Iterator[Any]:
        yield self.result.model

    def weight_bytes(self) -> int:
        return _bytes(self.result.model) - self.result.dense_bytes + self.result.packed_bytes

    def save(self, folder: str | os.PathLike[str]) -> None:
        self.result.save(Path(folder), layout="packed")


@dataclass(frozen=True)
class ReadyDense:
    """The model as it is; see :class:`Ready`."""

    model: Any
    spec: str = DENSE
    seconds: float = 0.0
    note: str = ""

    @contextmanager
    def at(self, tokens: int) -> Iterator[Any]:
        yield self.model

    def weight_bytes(self) -> int:
        return _bytes(self.model)

    def save(self, folder: str | os.PathLike[str]) -> None:
        raise ValueError("the dense model has no recipe to keep")


def all_names() -> list[str]:
    """Recipes and weight methods."""
    return sorted({*list_recipes(), *WEIGHTS})


def parse_methods(methods: str | Sequence[str]) -> list[Method]:
    """``"all"``, or names with options, in the order given.

    Raises:
        ValueError: none, or one that is not known.
    """
    if methods == "all" or list(methods) == ["all"]:
        return [Method(name, name) for name in all_names()]
    found = [Method.parse(spec) for spec in ([methods] if isinstance(methods, str) else methods)]
    if not found:
        raise ValueError(f"no methods given: 'all', or some of {', '.join(all_names())}")
    return list({method.spec: method for method in found}.values())


def describe(name: str, options: Mapping[str, Any]) -> str:
    """``name(option=value, ...)``."""
    shown = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{name}({shown})" if shown else name


def check_model(model: Any) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless the model is a decoder that recipes can serve."""
    Host.of(model)


def _weight_function(name: str) -> Any:
    import cenote.tuning

    return getattr(cenote.tuning, f"quantize_{name}")


def _bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
