"""Visual attention redistribution: what sinks draw goes to the rest of the image, in heads that look at it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.attention.base import LayerCall, Recipe, Session, refuse_unserved
from cenote.attention.host import Host
from cenote.attention.sink_dimensions import KNOWN, find_sink_dimensions
from cenote.ops.attention_sinks import redistribute_attention, sink_scores
from cenote.ops.attention_statistics import map_rows
from cenote.ops.shared_attention import apply_map


@dataclass(frozen=True)
class VisualAttentionRedistribution(Recipe):
    """VAR of "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (arXiv 2503.03321).

    In every layer but the first two and the last, tokens whose residual stream has a massive activation in the
    model's sink dimensions (:func:`~cenote.ops.attention_sinks.sink_scores` above ``tau``) are sinks. For text behind
    the image and every new token, heads that look at the image move a share of what sinks draw to the image's other
    tokens (:func:`~cenote.ops.attention_sinks.redistribute_attention`). Sinks are found once, in the prompt, and their
    places follow beams and crops of the cache. Only the rows that may change are worked out explicitly.

        recipe = VisualAttentionRedistribution(sink_dimensions="llama-2-7b")      # or .calibrate(model, batches)
        with recipe(llava) as session:
            llava.generate(**inputs)
        session.moved                                           # attention moved, by layer

    Rows with padding, batches, several images and grouped queries are served, and the rule of the paper is the default;
    the official code's conventions are options. Its state that leaks from one sample to the next is not reproduced.

    Args:
        sink_dimensions: of the language model's residual stream, or the name of a model whose are published
            (:data:`~cenote.attention.sink_dimensions.KNOWN`). None yet: calibrate first.
        tau: a token above this score is a sink.
        moved: share of the sinks' attention that is moved (official setting ``p``: ``1 - moved``).
        rho: least share of a head's attention to the image that is not on sinks; 0.8 for general questions, 0.5
            against hallucination, 0.9 for vision-centric ones.
        min_mass: least attention of a head to the image.
        first_layers: layers at the beginning that are left alone.
        last_layers: layers at the end that are left alone.
        image_span: first image token and number of them, counted from a row's first real token, for models that do
            not say themselves where the image is; otherwise the host's image token tells.
        head_rule: see there.
        needs_visual_sink: see there.

    Raises:
        ValueError: settings out of range.
    """

    name: ClassVar[str] = "visual_attention_redistribution"
    needs_state: ClassVar[bool] = True

    sink_dimensions: tuple[int, ...] | str | None = None
    tau: float = 20.0
    moved: float = 0.6
    rho: float = 0.8
    min_mass: float = 0.2
    first_layers: int = 2
    last_layers: int = 1
    image_span: tuple[int, int] | None = None
    head_rule: str = "non_sink_share"
    needs_visual_sink: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.sink_dimensions, str):
            if self.sink_dimensions not in KNOWN:
                raise ValueError(f"sink dimensions are known of {sorted(KNOWN)}, got {self.sink_dimensions!r}")
            object.__setattr__(self, "sink_dimensions", KNOWN[self.sink_dimensions])
        shares = (self.moved, self.min_mass)
        if self.tau <= 0 or self.rho < 0 or not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                "expected tau above 0, rho of at least 0, moved and min_mass in [0, 1], got "
                f"{self.tau}, {self.rho}, {shares}"
            )
        if self.image_span is not None and (self.image_span[0] < 0 or self.image_span[1] < 1):
            raise ValueError(f"image_span is (first token >= 0, number of tokens >= 1), got {self.image_span}")
        if self.head_rule not in ("non_sink_share", "sink_share"):
            raise ValueError(f"head_rule must be 'non_sink_share' or 'sink_share', got {self.head_rule!r}")

    def start(self, host: Host) -> RedistributionSession:
        if not self.sink_dimensions:
            raise ValueError(
                f"{self.name} needs the model's sink dimensions: use recipe.calibrate(model, batches), or name a model "
                f"whose are published ({', '.join(sorted(KNOWN))})"
            )
        assert isinstance(self.sink_dimensions, tuple)
        width = int(host.config.hidden_size)
        if max(self.sink_dimensions) >= width or min(self.sink_dimensions) < 0:
            raise ValueError(f"sink dimensions {self.sink_dimensions} do not fit a residual stream of width {width}")
        layers = range(self.first_layers, host.num_layers - self.last_layers)
        refuse_unserved(self.name, host, layers, "leave them out by first_layers and last_layers")
        token = getattr(getattr(host.model, "config", None), "image_token_id", None)
        if self.image_span is None and token is None:
            raise ValueError(f"{type(host.model).__name__} has no image token: say where the image is by image_span")
        return RedistributionSession(host, layers, self, token)

    def calibrate(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> VisualAttentionRedistribution:
        """The recipe with the model's sink dimensions, measured on these inputs
        (:func:`~cenote.attention.sink_dimensions.find_sink_dimensions`); itself where they are given."""
        if self.sink_dimensions:
            return self
        return replace(self, sink_dimensions=find_sink_dimensions(model, batches, tau=self.tau))


class Marks:
    """Which tokens of a cached sequence are sinks and image, as state of a cache's layer."""

    def __init__(self, sinks: Bool[Tensor, "batch tokens"], image: Bool[Tensor, "batch tokens"]) -> None:
        self.sinks, self.image = sinks, image

    def select(self, rows: Tensor) -> None:
        self.sinks, self.image = self.sinks.index_select(0, rows), self.image.index_select(0, rows)

    def crop(self, length: int) -> None:
        self.sinks, self.image = self.sinks[:, :length], self.image[:, :length]

    def grown(self, keys: int) -> tuple[Tensor, Tensor]:
        """Both for so many keys: tokens that came later are neither."""
        missing = max(keys - self.sinks.shape[1], 0)
        sinks, image = (nn.functional.pad(part, (0, missing)) for part in (self.sinks, self.image))
        return sinks[:, :keys], image[:, :keys]


class RedistributionSession(Session):
    """:class:`VisualAttentionRedistribution` at work.

    Attributes:
        moved: attention moved in the last pass, ``(batch, heads, rows)`` of the rows that might change, by layer.
        selected: which of those rows were changed, alike.
    """

    def __init__(
        self, host: Host, layers: Iterable[int], recipe: VisualAttentionRedistribution, image_token: int | None
    ) -> None:
        super().__init__(host, layers)
        self.recipe, self.image_token = recipe, image_token
        self.moved: dict[int, Tensor] = {}
        self.selected: dict[int, Tensor] = {}
        self._residual: dict[int, Tensor] = {}
        self._image: Tensor | None = None
        self._handles = [host.model.register_forward_pre_hook(self._look, with_kwargs=True)]
        for layer in self.layers:
            hook = self._note(layer)
            self._handles.append(host.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._image = None if ids is None or self.image_token is None else ids == self.image_token

    def _note(self, layer: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._residual[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return note

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, kwargs: dict[str, Any]) -> None:
        self.moved.clear()
        self.selected.clear()

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        keys = call.offset + call.queries
        residual = self._residual.pop(call.layer)
        sinks, image = self._prompt(call, residual) if call.prompt else self._later(call, keys)
        rows = self._rows(image, call.offset)
        if not bool((rows.any(dim=-1) & sinks.any(dim=-1)).any()):
            return call.dense()
        first = int(rows.any(dim=0).nonzero()[0])
        key, value = call.key[:, :, :keys], call.value[:, :, :keys]
        outputs = [call.dense()[:, :, :first]] if first else []
        for part, weights in map_rows(call.query[:, :, first:], key, call.real[:, :keys], scale=call.scale):
            recipe = self.recipe
            after = redistribute_attention(
                weights, sinks, image, rows[:, first:][:, part],
                moved=recipe.moved, rho=recipe.rho, min_mass=recipe.min_mass, head_rule=recipe.head_rule,
                needs_visual_sink=recipe.needs_visual_sink,
            )  # fmt: skip
            outputs.append(apply_map(after.weights.to(value.dtype), value))
            for kept, new in ((self.moved, after.moved), (self.selected, after.selected)):
                kept[call.layer] = torch.cat([kept[call.layer], new], 2) if call.layer in kept else new
        return torch.cat(outputs, dim=2)

    def _prompt(self, call: LayerCall, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Sinks and image of a prompt, remembered in the layer's place of the cache."""
        real = call.real[:, : call.queries]
        dimensions = self.recipe.sink_dimensions
        assert isinstance(dimensions, tuple)
        sinks = (sink_scores(residual, dimensions) > self.recipe.tau) & real
        image = self._image_of(real)
        if call.inputs.cache is not None:
            call.inputs.cache.state = Marks(sinks, image)
        return sinks, image

    def _later(self, call: LayerCall, keys: int) -> tuple[Tensor, Tensor]:
        state = getattr(call.inputs.cache, "state", None)
        if not isinstance(state, Marks):
            raise ValueError(f"{self.recipe.name} did not see the prompt: begin with a fresh cache inside the block")
        return state.grown(keys)

    def _image_of(self, real: Tensor) -> Tensor:
        if self.recipe.image_span is not None:
            first, count = self.recipe.image_span
            number = real.long().cumsum(dim=1) - 1
            image = real & (number >= first) & (number < first + count)
            if not bool((image.sum(dim=1) == count).all()):
                raise ValueError(f"image_span {self.recipe.image_span} reaches beyond the tokens of a row")
            return image
        if self._image is None or self._image.shape != real.shape:
            raise ValueError(f"{self.recipe.name} finds the image by its token: give the model input_ids")
        return self._image & real

    @staticmethod
    def _rows(image: Tensor, offset: int) -> Tensor:
        """Queries that may change: those that are no image and have some of it before them."""
        return (~image & (image.cumsum(dim=1) > 0))[:, offset:]


def published(dimensions: Sequence[int], **settings: Any) -> VisualAttentionRedistribution:
    """The official code's conventions: ``p = 0.6`` of a sink is kept, heads are chosen by the sinks' share, and
    nothing changes in a layer without a visual sink."""
    chosen = {"moved": 0.4, "head_rule": "sink_share", "needs_visual_sink": True, "last_layers": 0, **settings}
    return VisualAttentionRedistribution(tuple(dimensions), **chosen)
