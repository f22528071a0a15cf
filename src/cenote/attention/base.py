"""What a recipe is: settings that, within a ``with`` block, make a live transformers model attend differently."""

from __future__ import annotations

import dataclasses
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from cenote.attention.cache import PreallocatedLayer
from cenote.attention.host import Host, LayerInputs, cache_argument, cache_of, give_cache_layers
from cenote.attention.plan import LayerPlan
from cenote.files import write_all
from cenote.integrations.attention_interface import Attended, AttentionCall, HostMask, redirected
from cenote.ops.rotary import unrotate

RecipeT = TypeVar("RecipeT", bound="Recipe")
SETTINGS = "recipe.json"
TENSORS = "recipe.safetensors"


@dataclass(frozen=True)
class LayerCall:
    """One layer attending in one forward pass, as a recipe sees it.

    Shapes: ``query`` (batch, heads, queries, head_dim); ``key`` and ``value`` (batch, kv_heads, keys, head_dim) with
    those of the cache, positions rotated in. With a static cache ``keys`` counts its unused places too; ``real`` and
    ``visible`` exclude them.
    """

    layer: int
    inputs: LayerInputs
    call: AttentionCall

    @property
    def query(self) -> Tensor:
        return self.call.query

    @property
    def key(self) -> Tensor:
        return self.call.key

    @property
    def value(self) -> Tensor:
        return self.call.value

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def groups(self) -> int:
        """Query heads that share a key and value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        return self.call.scaling if self.call.scaling is not None else self.query.shape[-1] ** -0.5

    @property
    def offset(self) -> int:
        """Keys that were there before the first query."""
        return self.call.mask.offset

    @property
    def prompt(self) -> bool:
        """Whether this is the pass of a prompt: nothing was cached before it."""
        return self.offset == 0

    @property
    def decoding(self) -> bool:
        """Whether this is one new token behind cached ones. More than one new token is a continuation: neither."""
        return self.queries == 1 and self.offset > 0

    @cached_property
    def real(self) -> Bool[Tensor, "batch keys"]:
        """Which keys hold a real token, up to the last query."""
        batch, keys = self.query.shape[0], self.keys
        there = torch.arange(keys, device=self.key.device) < self.offset + self.queries
        padding = self.call.mask.padding
        return there.expand(batch, -1) if padding is None else padding & there

    @property
    def padded(self) -> bool:
        """Whether any row has padding."""
        return self.call.mask.padding is not None

    def visible(self, first: int = 0, last: int | None = None) -> Bool[Tensor, "batch 1 rows keys"]:
        """Which keys the queries ``first`` to ``last - 1`` see."""
        return self.call.mask.rows(first, self.queries if last is None else last)

    def unrotated(self) -> tuple[Tensor, Tensor]:
        """Queries and the new tokens' keys before rotary positions, shaped as they are behind them.

        Raises:
            ValueError: a host whose attention is given no rotary positions.
        """
        if self.inputs.rotary is None:
            raise ValueError(f"{type(self.call.module).__name__} is given no rotary positions")
        cos, sin = (part.unsqueeze(1) for part in self.inputs.rotary)
        new = self.key[:, :, self.offset : self.offset + self.queries]
        return unrotate(self.query, cos, sin), unrotate(new, cos, sin)

    def dense(self) -> Float[Tensor, "batch heads queries head_dim"]:
        """What the layer would attend to without the recipe."""
        return self.call.proceed()[0].transpose(1, 2)

    def explicit(
        self,
    ) -> tuple[Float[Tensor, "batch heads queries head_dim"], Float[Tensor, "batch heads queries keys"]]:
        """The same with the attention map, which the host's explicit implementation makes.

        Raises:
            ValueError: a host that has none.
        """
        output, maps = self.call.proceed("eager")
        if maps is None:
            raise ValueError(f"{type(self.call.module).__name__} makes no attention maps")
        return output.transpose(1, 2), maps


class Session:
    """A recipe at work in a model.

    Subclasses answer :meth:`attend`; what lives for one forward pass is made anew in :meth:`begin`.

    Args:
        host: the model.
        layers: the layers that the recipe changes; the others never reach :meth:`attend`.
    """

    def __init__(self, host: Host, layers: Iterable[int]) -> None:
        self.host, self.layers = host, frozenset(layers)
        self.inputs: dict[int, LayerInputs] = {}

    def begin(self, kwargs: dict[str, Any]) -> None:
        """A forward pass of the decoder starts, with these arguments."""

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        """What the layer's queries get. ``call.dense()`` is what they would get without the recipe."""
        return call.dense()

    def finish(self) -> None:
        """A forward pass of the decoder is over, its tokens are in the cache."""

    def end(self) -> None:
        """The block is left: undo what was changed in the model beside attention."""


@dataclass(frozen=True)
class Recipe(ABC):
    """Settings of a method. ``with recipe(model): model.generate(...)`` makes the model attend in its way.

    Takes effect through transformers' attention and mask interfaces and hooks, in the text decoder of the model only;
    leaving the block restores the model bit for bit, also after an exception. Blocks nest where the recipes change
    different layers; what the inner one leaves alone, or calls dense, reaches the outer one. A fresh cache is given
    layers of ours (:class:`~cenote.attention.cache.PreallocatedLayer`). Forward passes that ask for attention maps
    are refused.
    """

    name: ClassVar[str]
    cache_layer: ClassVar[type[PreallocatedLayer]] = PreallocatedLayer
    needs_state: ClassVar[bool] = False
    """Whether it keeps state in the cache's layers, so that those of a static cache have to be replaced as well."""

    @abstractmethod
    def start(self, host: Host) -> Session:
        """Look at the model, refuse by name what cannot be served, and give the session.

        Raises:
            ValueError: settings that do not fit the model, or layers that the method cannot serve.
        """

    def calibrate(self: RecipeT, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> RecipeT:
        """The recipe with what it learnt from the model on these inputs (``input_ids`` and ``attention_mask``, as the
        model's forward takes them); itself where there is nothing to learn."""
        return self

    @contextmanager
    def __call__(self, model: Any) -> Iterator[Session]:
        """Attend in this way within the block."""
        host = Host.of(model)
        session = self.start(host)
        taken = _ACTIVE.setdefault(id(host.decoder), [])
        try:
            with ExitStack() as undo:
                undo.callback(session.end)
                for name, layers in taken:
                    both = sorted(layers & session.layers)
                    if both:
                        raise ValueError(f"{self.name} and {name} both change layers {both}: they cannot be nested")
                entry = (self.name, session.layers)
                taken.append(entry)
                undo.callback(taken.remove, entry)
                _hook(self, session, undo)
                yield session
        finally:
            if not taken:
                _ACTIVE.pop(id(host.decoder), None)

    def settings(self) -> dict[str, Any]:
        """The fields that are no tensors, as JSON can hold them."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if not isinstance(getattr(self, field.name), Tensor | dict)
        }

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors or dictionaries of tensors, flattened: ``field`` or ``field/name``."""
        found: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value
            elif isinstance(value, dict):
                found |= {f"{field.name}/{key}": tensor for key, tensor in value.items()}
        return found

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``recipe.json`` and, where there are tensors, ``recipe.safetensors``; both or neither."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        described = {"recipe": self.name, "settings": self.settings(), "tensors": sorted(tensors)}
        files: dict[str, str | bytes] = {TENSORS: save(tensors)} if tensors else {}
        write_all(Path(folder), {**files, SETTINGS: json.dumps(described, indent=2) + "\n"})

    @classmethod
    def from_pretrained(cls: type[RecipeT], folder: str | os.PathLike[str]) -> RecipeT:
        """Read what :meth:`save_pretrained` wrote. ``Recipe.from_pretrained`` gives a recipe of whatever kind.

        Raises:
            ValueError: no recipe there, one of another kind, or settings that it does not take.
        """
        path = Path(folder)
        try:
            read = json.loads((path / SETTINGS).read_text())
            name, settings = read["recipe"], dict(read["settings"])
        except FileNotFoundError:
            raise ValueError(f"{path} holds no {SETTINGS}: expected a folder that save_pretrained wrote") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path / SETTINGS} does not describe a recipe: {error!r}") from error
        from cenote.attention.registry import recipe_class

        kind = recipe_class(name)
        if not issubclass(kind, cls):
            raise ValueError(f"{path} holds a {kind.__name__}, not a {cls.__name__}")
        if read.get("tensors"):
            for key, tensor in load_file(path / TENSORS).items():
                field, slash, part = key.partition("/")
                if slash:
                    settings.setdefault(field, {})[part] = tensor
                else:
                    settings[field] = tensor
        try:
            return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})
        except TypeError as error:
            raise ValueError(f"{path / SETTINGS}: {error}") from error


_ACTIVE: dict[int, list[tuple[str, frozenset[int]]]] = {}
"""Recipes at work and the layers they change, by ``id`` of the decoder."""


def refuse_unserved(recipe: str, host: Host, layers: Iterable[int], declare: str = "leave them out") -> None:
    """Raise ``ValueError`` if any of these layers attends otherwise than by plain causal softmax."""
    why = host.unserved()
    wrong = {layer: why[layer] for layer in layers if layer in why}
    if wrong:
        what = ", ".join(f"layer {layer} ({reason})" for layer, reason in wrong.items())
        raise ValueError(f"{recipe} cannot serve {what}: {declare}")


def _hook(recipe: Recipe, session: Session, undo: ExitStack) -> None:
    host = session.host
    numbers = {id(attention): layer for layer, attention in enumerate(host.attentions)}

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if kwargs.get("output_attentions") or getattr(host.config, "output_attentions", False):
            raise ValueError(f"{recipe.name} makes no attention maps: run without output_attentions")
        cache = cache_of(kwargs)
        if cache is None and recipe.needs_state and _caches(kwargs, host):
            cache = DynamicCache(config=host.config)  # as the decoder itself would make it
            kwargs = {**kwargs, **cache_argument(cache)}
        if cache is not None:
            give_cache_layers(cache, recipe.cache_layer, host.num_layers, recipe.needs_state)
        if recipe.needs_state:
            # ``generate`` prepares the mask of a static cache ahead, for the layers that have just been replaced.
            mask = kwargs.get("attention_mask")
            mask = next(iter(mask.values())) if isinstance(mask, dict) else mask
            if isinstance(mask, HostMask):
                kwargs = {**kwargs, "attention_mask": mask.given}
        session.begin(kwargs)
        return args, kwargs

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = numbers[id(module)]
        session.inputs[layer] = LayerInputs.from_call(layer, args, kwargs)

    def attend(call: AttentionCall) -> Attended:
        layer = numbers.get(id(call.module))
        if layer is None or layer not in session.layers:
            return call.proceed()
        if not call.mask.plain_causal:
            raise ValueError(
                f"{recipe.name} serves causal attention with a mask (batch, tokens) of the real tokens: give the model "
                "no other mask and no packed sequences"
            )
        if call.settings.get("dropout"):
            raise ValueError(f"{recipe.name} has no attention dropout: put the model in eval mode")
        try:
            output = session.attend(LayerCall(layer, session.inputs[layer], call))
        finally:
            session.inputs.pop(layer, None)
        return output.transpose(1, 2).contiguous(), None

    undo.enter_context(redirected(host.decoder, attend, lazy_mask=True))
    undo.callback(host.decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
    undo.callback(host.decoder.register_forward_hook(lambda *_: session.finish()).remove)
    for attention in host.attentions:
        undo.callback(attention.register_forward_pre_hook(note, with_kwargs=True).remove)


def _caches(kwargs: dict[str, Any], host: Host) -> bool:
    asked = kwargs.get("use_cache")
    return bool(getattr(host.config, "use_cache", False) if asked is None else asked)


def _plain(value: Any) -> Any:
    if isinstance(value, LayerPlan):
        return list(value.roles)
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value
