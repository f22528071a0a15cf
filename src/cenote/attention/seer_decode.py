"""SeerAttention-R: a decoding step attends to the blocks of the cache that a learned gate scores highest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.attention.base import LayerCall, Session, refuse_unserved
from cenote.attention.cache import PreallocatedLayer
from cenote.attention.compressed_keys import CompressedKeys
from cenote.attention.host import Host
from cenote.attention.seer_gate import DecodeGate, check_query_pooling
from cenote.attention.seer_learning import GatedRecipe
from cenote.ops.block_gate import check_sparsity, parse_kinds
from cenote.ops.decode_gate import block_scores, choose_decode_blocks
from cenote.ops.gather_attention import Positions, gather_attention
from cenote.ops.rotary import unrotate


@dataclass(frozen=True)
class SeerDecode(GatedRecipe):
    """A new token attends, per key and value head, to the blocks of the cache that a small gate scores highest.

    ``scores = softmax_j(q_gate k_gate_j^T / sqrt(hidden_size))`` (:class:`~cenote.attention.seer_gate.DecodeGate`) of
    the heads of a group as one query and one compressed key a block, kept beside the keys of the cache. The
    ``token_budget // block_size`` best blocks are attended to, and always the last and the first: at most two blocks
    more than the budget. Prompts and continuations of several tokens are dense. Source: "SeerAttention-R: Sparse
    Attention Adaptation for Long Reasoning" (arXiv 2506.08889).

        recipe = SeerDecode(block_size=16, token_budget=256).calibrate(model, batches)
        with recipe(model) as session:
            model.generate(**inputs)
        session.densities()                                     # what each layer attended to

    Gates come from :meth:`calibrate`, from :func:`cenote.tuning.seer_distillation.distill_gates` or from
    :func:`cenote.integrations.seer_checkpoints.load_seer_decode`. Other than the official code: a row's blocks begin at
    its first real token, so that padding changes nothing; every layer counts its own unfinished block (the official
    count is right in the first layer only); blocks finished while decoding are turned to their first position, as in
    training; the gate runs in float32.

    Args:
        block_size: tokens of a block.
        token_budget: tokens of the best blocks together, rounded down to whole blocks.
        threshold: attend to the blocks whose score is above it instead; 0 attends to all.
        hidden_size: width of the gates; ``None`` for that of the heads.
        key_pooling: ``K<kinds>`` with kinds of pooling out of ``max``, ``min``, ``avg``.
        query_pooling: ``"Qproj"``, ``"Qavgproj"`` or ``"Qavg"``.
        qk_norm: normalise behind the gate's projections.
        rotary: turn positions into the gate's queries and keys.
        start_layer: the layers below it stay dense.
        dense_layers: more layers left alone, such as those with sliding windows.
        completed_position: ``"last"`` turns blocks finished while decoding to their last position, as the official code
            does.
        gates: weights by ``"<layer>.<parameter>"``, such as ``"0.key.weight"``.

    Raises:
        ValueError: settings out of range; in a model that gates are missing or do not fit.
    """

    name: ClassVar[str] = "seer_decode"
    needs_state: ClassVar[bool] = True

    block_size: int = 64
    token_budget: int = 2048
    threshold: float | None = None
    hidden_size: int | None = None
    key_pooling: str = "Kmaxminavg"
    query_pooling: str = "Qproj"
    qk_norm: bool = True
    rotary: bool = True
    start_layer: int = 0
    dense_layers: tuple[int, ...] = ()
    completed_position: str = "first"
    gates: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.token_budget < self.block_size:
            raise ValueError(f"token_budget {self.token_budget} is less than one block of {self.block_size} tokens")
        check_sparsity(1.0, self.threshold)
        parse_kinds(self.key_pooling, "K")
        check_query_pooling(self.query_pooling)
        if self.hidden_size is not None and self.hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {self.hidden_size}")
        if self.start_layer < 0:
            raise ValueError(f"start_layer must be at least 0, got {self.start_layer}")
        if self.completed_position not in ("first", "last"):
            raise ValueError(f"completed_position must be 'first' or 'last', got {self.completed_position!r}")

    @property
    def gate_type(self) -> str:
        return f"{self.query_pooling}_{self.key_pooling}"

    def new_gate(self, host: Host) -> DecodeGate:
        return DecodeGate(
            host.num_heads, host.num_kv_heads, host.head_dim, self.block_size, self.hidden_size, self.key_pooling,
            self.query_pooling, self.qk_norm, self.rotary,
        )  # fmt: skip

    def sparse_layers(self, host: Host) -> list[int]:
        """The layers that the recipe changes.

        Raises:
            ValueError: layers that the model lacks, or that the recipe cannot serve.
        """
        wrong = [layer for layer in self.dense_layers if not 0 <= layer < host.num_layers]
        if wrong:
            raise ValueError(f"dense_layers {wrong} are no layers of a model of {host.num_layers}")
        if self.start_layer >= host.num_layers:
            raise ValueError(f"start_layer {self.start_layer} leaves no layer of a model of {host.num_layers}")
        layers = [layer for layer in range(self.start_layer, host.num_layers) if layer not in self.dense_layers]
        refuse_unserved(self.name, host, layers, "name them in dense_layers")
        return layers

    def start(self, host: Host) -> SeerDecodeSession:
        return SeerDecodeSession(host, self.sparse_layers(host), self, self.load_gates(host))


class SeerDecodeSession(Session):
    """Single new tokens attend to chosen blocks of the cache, everything else is dense."""

    def __init__(self, host: Host, layers: Iterable[int], recipe: SeerDecode, gates: nn.ModuleDict) -> None:
        super().__init__(host, layers)
        self.recipe, self.gates = recipe, gates
        self._given: Tensor | None = None
        self._read: dict[int, tuple[int, int]] = {}

    def begin(self, kwargs: dict[str, Any]) -> None:
        self._given = kwargs.get("position_ids")

    @torch.no_grad()
    def _choose(self, call: LayerCall, query: Tensor, state: CompressedKeys) -> Bool[Tensor, "batch kv_heads blocks"]:
        """Which blocks of each row the new token attends to."""
        recipe, counts = self.recipe, state.blocks()
        blocks = int(counts.max())
        there = torch.arange(blocks, device=counts.device) < counts[:, None]
        read = state.gate.queries(query, call.inputs.rotary)
        scores = block_scores(read, state.keys(blocks), there).squeeze(2)
        chosen = choose_decode_blocks(
            scores, there, budget=recipe.token_budget // recipe.block_size, threshold=recipe.threshold
        )
        kept, possible = self._read.get(call.layer, (0, 0))
        self._read[call.layer] = kept + int(chosen.sum()), possible + int(there.sum()) * chosen.shape[1]
        return chosen

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        if call.inputs.cache is None:  # a prompt that leaves nothing behind
            return call.dense()
        query, key = call.unrotated() if call.inputs.rotary is not None else (call.query, self._new(call))
        state = self._state(call)
        held = call.offset + call.queries
        real = call.real[:, :held] if call.padded else None
        state.extend(key.detach(), call.inputs.rotary, None if real is None else real[:, call.offset :])
        if not call.decoding:
            return call.dense()
        chosen = self._choose(call, query, state)
        if bool(chosen.sum(dim=-1).eq(state.blocks()[:, None]).all()):
            return call.dense()
        positions = block_positions(chosen, self.recipe.block_size, held, real)
        return gather_attention(call.query, call.key, call.value, positions, call.scale)

    def densities(self) -> dict[int, float]:
        """Share of the blocks there that each layer attended to, over all steps of decoding so far."""
        return {layer: kept / possible for layer, (kept, possible) in sorted(self._read.items())}

    def _new(self, call: LayerCall) -> Tensor:
        return call.key[:, :, call.offset : call.offset + call.queries]

    def _state(self, call: LayerCall) -> CompressedKeys:
        """What is known of the cache in front of the new tokens; read from its keys again where that is not so: a cache
        that was begun, cut or gone on with outside the block, or is none of ours."""
        gate, layer = self.gates[str(call.layer)], call.inputs.cache
        assert isinstance(gate, DecodeGate)
        ours = isinstance(layer, PreallocatedLayer)
        held = layer.state if ours else None
        if isinstance(held, CompressedKeys) and held.gate is gate and held.tokens == call.offset:
            return held
        state = CompressedKeys(gate, self.recipe.completed_position)
        if ours:
            layer.state = state
        if call.offset:
            key, rotary = call.key[:, :, : call.offset].detach(), self._past(call)
            if rotary is not None:
                key = unrotate(key, rotary[0].unsqueeze(1), rotary[1].unsqueeze(1))
            state.extend(key, rotary, call.real[:, : call.offset] if call.padded else None)
        return state

    def _past(self, call: LayerCall) -> tuple[Tensor, Tensor] | None:
        """Rotary positions of the cached tokens, which stand one by one in front of the first new one."""
        if call.inputs.rotary is None:
            return None
        embed = getattr(self.host.decoder, "rotary_emb", None)
        if embed is None or (self._given is not None and self._given.ndim != 2):
            raise ValueError(
                f"{self.recipe.name} cannot tell the positions of the cached tokens: begin the text inside the block"
            )
        first = torch.tensor([[call.offset]]) if self._given is None else self._given[:, :1]
        places = torch.arange(-call.offset, 0, device=call.key.device)
        cos, sin = embed(call.inputs.hidden, (first.to(places.device) + places).clamp(min=0))
        return cos, sin


def block_positions(
    chosen: Bool[Tensor, "batch kv_heads blocks"],
    block_size: int,
    held: int,
    real: Bool[Tensor, "batch held"] | None = None,
) -> Positions:
    """Places in a cache of ``held`` tokens of chosen blocks, which are counted from a row's first real token."""
    picked = Positions.from_mask(chosen)
    device = chosen.device
    tokens = torch.full(chosen.shape[:1], held, device=device) if real is None else real.sum(dim=1)
    index = (picked.index.unsqueeze(-1) * block_size + torch.arange(block_size, device=device)).flatten(2)
    used = index < tokens[:, None, None]
    if picked.mask is not None:
        used = used & picked.mask.repeat_interleave(block_size, dim=-1)
    index = index.clamp(max=held - 1)
    if real is not None:  # from places among a row's real tokens to places in the cache
        order = (~real).byte().argsort(dim=1, stable=True)
        index = order[:, None].expand(-1, index.shape[1], -1).gather(2, index)
    return Positions(index, used)
