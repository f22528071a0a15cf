"""EchoAtt: layers that copy the attention map of an earlier layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from cenote.attention.base import LayerCall, Recipe, Session, refuse_unserved
from cenote.attention.echo_att_cache import give_value_layers
from cenote.attention.echo_att_similarity import layer_similarity
from cenote.attention.host import Host, cache_of
from cenote.attention.plan import LayerPlan
from cenote.ops.layer_sharing import choose_by_gap, choose_by_similarity
from cenote.ops.shared_attention import FORMS, apply_map, attention_map


@dataclass(frozen=True)
class EchoAtt(Recipe):
    """Shared attention maps on an unchanged model: ``with EchoAtt(shared_layers=(4, 5))(model): model.generate(...)``.

    A shared layer ``j`` gives ``A_i V_j``, where ``A_i = softmax(Q_i K_i^T / sqrt(D))`` is the map of the nearest
    earlier layer ``i`` that is not shared and ``V_j`` are its own values; its output projection and feed-forward
    network are its own too. Its queries and keys are still projected, as the model is unchanged: to be rid of those
    weights as well, and to repair the model by training, see
    :func:`cenote.integrations.echo_att_model.share_attention`.

    Shared layers keep no keys in a cache that they are given, as by ``generate`` (a static cache has room for them,
    which stays unused), so that a cache begun inside the block cannot be continued outside. Only layers that are copied
    from make their map explicitly.

    Paper: "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models" (arXiv 2409.14595). No official
    code was found. The paper prints blocks of ``k + 1`` layers where its text says ``k``; here a set of layers is
    given, as in its tables.

    Args:
        shared_layers: layers that copy, counted from 0; layer 0 cannot. Empty for the dense model.
        form: ``"probabilities"`` hands the map on (one ``(batch, heads, queries, keys)`` matrix is alive);
            ``"query_key"`` hands queries and keys on and lets every follower run the model's own kernel on them: the
            same result without a map, and without its savings beside the key cache.
        ratio: what :meth:`calibrate` chooses where no layers are given: this share of the layers, by similarity, or
            ``"auto"`` for blocks of the inner layers behind the largest gap.
        block_size: layers of such a block, the first of which computes.

    Raises:
        ValueError: layer 0, repeated layers, an unknown form, a ratio outside 0 to 1; when entered: layers that the
            model does not have, source and follower of other heads or another kind of attention, a ratio that was not
            calibrated.
    """

    name: ClassVar[str] = "echo_att"
    shared_layers: tuple[int, ...] = ()
    form: str = "probabilities"
    ratio: float | str | None = None
    block_size: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared_layers", tuple(self.shared_layers))
        LayerPlan.from_shared(max([0, *self.shared_layers]) + 1, self.shared_layers)
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if self.block_size < 2:
            raise ValueError(f"a block that shares has 2 layers at least, got block_size={self.block_size}")
        if isinstance(self.ratio, str) and self.ratio != "auto":
            raise ValueError(f"ratio must be a number, 'auto' or None, got {self.ratio!r}")
        if isinstance(self.ratio, int | float) and not 0 < self.ratio < 1:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}")

    def calibrate(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> EchoAtt:
        """The recipe with layers chosen by the similarity of the model's maps on these inputs.

        Itself where layers are given or no ratio is.

        Raises:
            ValueError: no inputs, padding without a mask, fewer than three layers or no two inner ones for ``"auto"``.
        """
        if self.shared_layers or self.ratio is None:
            return self
        alike = layer_similarity(model, batches)
        if isinstance(self.ratio, str):
            layers = choose_by_gap(alike, self.block_size)
            if not layers:
                raise ValueError("the similarities leave no block of inner layers to share: give a ratio")
        else:
            layers = choose_by_similarity(alike, self.ratio)
        return replace(self, shared_layers=layers)

    def start(self, host: Host) -> Session:
        if self.ratio is not None and not self.shared_layers:
            raise ValueError("echo_att has a ratio but no layers yet: calibrate it, or give shared_layers")
        plan = LayerPlan.from_shared(host.num_layers, self.shared_layers)
        check_alike(host, plan)
        return _Session(host, plan, self.form)


def check_alike(host: Host, plan: LayerPlan) -> None:
    """Raise ``ValueError`` unless every follower attends in the same way and with the same heads as its source."""
    sources = [layer for layer in range(len(plan)) if plan.followers(layer)]
    refuse_unserved("echo_att", host, [*sources, *plan.layers("reuse")], "share other layers")
    for source in sources:
        for layer in plan.followers(source):
            ours, theirs = (_heads(host.attentions[number]) for number in (layer, source))
            if ours != theirs:
                raise ValueError(
                    f"layer {layer} has heads and width {ours}, its source, layer {source}, has {theirs}: "
                    "expected equal"
                )


def _heads(attention: Any) -> tuple[int, ...]:
    projections = (getattr(attention, name, None) for name in ("q_proj", "v_proj"))
    return (attention.head_dim, *(part.out_features // attention.head_dim for part in projections if part is not None))


class _Session(Session):
    """Maps, or queries and keys, on their way from sources to followers within a forward pass."""

    def __init__(self, host: Host, plan: LayerPlan, form: str) -> None:
        self.plan, self.form = plan, form
        self.last = {i: max(plan.followers(i)) for i in range(len(plan)) if plan.followers(i)}
        super().__init__(host, (*self.last, *plan.layers("reuse")))
        self.handed: dict[int, Tensor | tuple[Tensor, Tensor]] = {}

    def begin(self, kwargs: dict[str, Any]) -> None:
        self.handed.clear()
        cache = cache_of(kwargs)
        if cache is not None:
            give_value_layers(cache, self.plan.layers("reuse"))

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        source = self.plan.source(call.layer)
        if source == call.layer:
            if self.form == "query_key":
                self.handed[source] = call.query, call.key
                return call.dense()
            self.handed[source] = attention_map(call.query, call.key, _mask(call), scale=call.scale)
        handed = self.handed[source]
        if self.last[source] == call.layer:
            del self.handed[source]
        if isinstance(handed, Tensor):
            return apply_map(handed, call.value)
        query, key = handed
        return call.call.proceed(query=query, key=key)[0].transpose(1, 2)

    def end(self) -> None:
        self.handed.clear()


def _mask(call: LayerCall) -> Tensor | None:
    """Who sees whom; nothing where a single new token sees every key."""
    if call.queries == 1 and not call.padded and call.keys == call.offset + 1:
        return None
    return call.visible()
