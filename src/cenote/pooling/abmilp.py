"""Attention-based multiple-instance learning pooling (AbMILP)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cenote.ops.masked import masked_softmax, require_real_tokens, zero_padding
from cenote.ops.positions import first_real
from cenote.ops.token_grid import sincos_positions
from cenote.pooling.base import Pooling
from cenote.pooling.blocks import SelfAttention, rename


class AbMILP(Pooling):
    """A small network scores every token; the softmax of the scores weighs them.

    ``a = softmax_n(w^T act(W y_n + b) + c)``, ``out = sum_n a_n y_n`` with ``y`` the tokens after single-head
    self-attention (output projection, no residual, no norm). Source: Ilse et al. (arXiv 1802.04712) with the
    self-attention of Rymarczyk et al. (arXiv 2005.12991), in the form that "Attention, Please!" (arXiv 2506.10178)
    benchmarks. Parameters of the defaults: ``5 dim^2 + 3 dim + 1``.

    Args:
        dim: token width.
        self_attention_apply_to: ``"both"`` scores and values from y; ``"map"`` scores from y, values from the tokens;
            ``"none"`` no self-attention.
        activation: ``"tanh"`` or ``"relu"``.
        depth: linear layers of the scoring network.
        cond: ``"pe"`` adds a fixed two-dimensional sine-cosine embedding to what is scored. The last
            ``height * width`` real tokens of an item are its patches; tokens before them (a class token, registers)
            get the embedding of no place.
        content: ``"patch"`` leaves out the first real token of every item (a class token), which then has weight 0; an
            item with no other token is refused.
        grid: rows and columns of the patch grid, needed with ``cond="pe"``.
    """

    name = "abmilp"
    paper = "efficient-probing"
    attends = True
    places: Tensor | None

    def __init__(
        self,
        dim: int,
        self_attention_apply_to: str = "both",
        activation: str = "tanh",
        depth: int = 2,
        cond: str = "none",
        content: str = "all",
        grid: tuple[int, int] | None = None,
    ) -> None:
        for option, value, known in (
            ("self_attention_apply_to", self_attention_apply_to, ("none", "map", "both")),
            ("activation", activation, ("tanh", "relu")),
            ("cond", cond, ("none", "pe")),
            ("content", content, ("all", "patch")),
        ):
            if value not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if cond == "pe" and grid is None:
            raise ValueError("cond='pe' needs grid=(height, width)")
        super().__init__(dim)
        self.apply_to, self.content = self_attention_apply_to, content
        self.attention = SelfAttention(dim, 1) if self_attention_apply_to != "none" else None
        layers: list[nn.Module] = []
        for _ in range(depth - 1):
            layers += [nn.Linear(dim, dim), nn.Tanh() if activation == "tanh" else nn.ReLU()]
        self.score = nn.Sequential(*layers, nn.Linear(dim, 1))
        # Row 0 is the embedding of tokens that have no place on the grid.
        places = torch.cat([torch.zeros(1, dim), sincos_positions(grid, dim)]) if cond == "pe" and grid else None
        self.register_buffer("places", places)
        self.permutation_invariant = cond == "none" and content == "all"  # type: ignore[misc]

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.content == "patch":
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
            behind = torch.arange(tokens.shape[1], device=tokens.device) > first_real(mask)[:, None]
            mask = mask & behind
            require_real_tokens(mask)
        tokens = zero_padding(tokens, mask)
        context = tokens if self.attention is None else self.attention(tokens, mask)
        scored = context if self.places is None else context + self._embedding(self.places, tokens, mask)
        scores = self.score(scored)
        weights = masked_softmax(scores.transpose(1, 2), mask)
        values = zero_padding(context, mask) if self.apply_to == "both" else tokens
        return (weights.to(values.dtype) @ values)[:, 0], weights

    @staticmethod
    def _embedding(places: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The embedding of each token, ``(batch, tokens, dim)``."""
        cells = places.shape[0] - 1
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        count = mask.sum(dim=1, keepdim=True)
        if not torch.compiler.is_compiling() and bool((count < cells).any()):
            raise ValueError(
                f"the embedding of {cells} patches needs at least as many real tokens, got {int(count.min())}"
            )
        return places[(mask.cumsum(dim=1) - count + cells).clamp(min=0)]

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> AbMILP:
        """From official keys ``self_attn.qkv``, ``self_attn.proj``, ``attention_predictor.i`` and, with
        ``cond="pe"``, ``pos_embed``.
        """
        patches = config.pop("num_patches", None)
        if config.get("cond") == "pe" and patches is not None:
            config.setdefault("grid", (int(patches**0.5),) * 2)
        attention = "both" if any(key.startswith("self_attn.") for key in state_dict) else "none"
        dim = state_dict["attention_predictor.0.weight"].shape[1]
        pool = cls(**{"dim": dim, "self_attention_apply_to": attention, **config})
        state = rename(state_dict, {"self_attn": "attention", "attention_predictor": "score", "pos_embed": "places"})
        if "places" in state:
            table = state["places"][0]
            state["places"] = torch.cat([torch.zeros_like(table[:1]), table]) if pool.content == "patch" else table
        pool.load_state_dict(state)
        return pool
