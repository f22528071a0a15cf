"""One attention layer with frozen random queries and keys, whose values are fitted by ridge regression."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.ops.masked import require_real_tokens
from cenote.ops.random_features import Activation, attention_features, infinite_width_kernel
from cenote.ops.ridge import ridge_path

PENALTIES = tuple(10.0**power for power in range(-7, 0))
"""Penalties tried by default, relative to the mean squared norm of an item's features."""
_BLOCK = 2**24


class RandomFeatureAttentionLayer(nn.Module):
    """``f(x_0; x_1 .. x_N) = sum_m mean_i relu([x_0; 1]^T W_m [x_i; 1]) <v_m, [x_i; 1]>``.

    ``W_m`` stands for the product of a head's query and key matrices: it is drawn once and frozen. The values ``v_m``
    are the only parameters, and the model is linear in them, so that :meth:`fit` solves for them. The answer does not
    depend on the order of the keys. Inputs are meant to have unit norm: then every score is standard normal over the
    draw of ``W`` (unbiased), or normal around ``<x_0, x_i>`` (biased).

    The paper (Fu et al., NeurIPS 2023, arXiv 2307.11353) leaves conventions open here reconstructed from its theory:
    entries of variance 1/4, and ``diag(I, 0)`` as the mean of biased weights. It is no approximation of softmax
    attention, unlike the "random feature attention" of Peng et al.

    Args:
        dim: width of query and keys.
        num_heads: frozen heads M; there are ``M (dim + 1)`` parameters.
        biased: weights around ``diag(I, 0)`` instead of 0, which helps where the target depends on ``<x_0, x_i>``.
        activation: ``"relu"`` and a mean over keys, ``"softmax"`` over keys, or a function of the scores.
        seed: of the frozen weights; they are also kept in the state dict, so a saved layer does not depend on how a
            seed is turned into numbers.

    Raises:
        ValueError: a width or a number of heads below 1, an unknown activation.
    """

    weight: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 256,
        *,
        biased: bool = False,
        activation: Activation = "relu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1:
            raise ValueError(f"dim and num_heads must be at least 1, got {dim} and {num_heads}")
        if not callable(activation) and activation not in ("relu", "softmax"):
            raise ValueError(f"activation must be 'relu', 'softmax' or a function, got {activation!r}")
        self.dim, self.num_heads, self.biased, self.activation = dim, num_heads, biased, activation
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(num_heads, dim + 1, dim + 1, generator=generator) / 2
        if biased:
            weight = weight + torch.diag(torch.cat([torch.ones(dim), torch.zeros(1)]))
        self.register_buffer("weight", weight)
        self.value = nn.Parameter(torch.zeros(num_heads, dim + 1))

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> RandomFeatureAttentionLayer:
        """From stored weights ``weight`` ``(heads, dim + 1, dim + 1)`` and ``value`` ``(heads, dim + 1)``."""
        heads, wide, _ = state_dict["weight"].shape
        layer = cls(wide - 1, heads, **config).to(state_dict["weight"].dtype)
        layer.load_state_dict({name: state_dict[name] for name in ("weight", "value")})
        return layer

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "items"]:
        """One number an item.

        Args:
            query: ``(items, dim)``.
            keys: ``(items, keys, dim)``.
            mask: ``(items, keys)`` boolean, ``True`` for a real key.

        Raises:
            TypeError: a mask that is not boolean.
            ValueError: shapes that disagree, no key, an item without a real key.
        """
        self._check(query, keys, mask)
        features = attention_features(query, keys, self.weight.to(query.dtype), mask, self.activation)
        return (features * self.value.to(features.dtype)).sum(dim=(1, 2))

    def features(
        self,
        query: Tensor,
        keys: Tensor,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "items features"]:
        """``phi``, head by head: the answer is ``phi . value``. Computed in blocks of items."""
        self._check(query, keys, mask)
        block = max(1, _BLOCK // (self.num_heads * max(keys.shape[1], self.dim + 1)))
        weight = self.weight.to(query.dtype)
        parts = [
            attention_features(
                query[at : at + block], keys[at : at + block], weight,
                None if mask is None else mask[at : at + block], self.activation,
            ).flatten(1)
            for at in range(0, len(query), block)
        ]  # fmt: skip
        return torch.cat(parts)

    @torch.no_grad()
    def fit(
        self,
        query: Tensor,
        keys: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        penalty: float | Sequence[float] | None = None,
    ) -> float:
        """Set the values to the solution of ``||y - Phi v||^2 / n + penalty M ||v||^2``, in float64.

        Args:
            penalty: ridge penalty; of several, or of :data:`PENALTIES` (times the mean squared norm of the features
                over M) by default, the one of least leave-one-out error.

        Returns:
            The penalty that was used.

        Raises:
            ValueError: as :meth:`forward`; a negative penalty, numbers that are not finite.
        """
        if tuple(targets.shape) != (len(query),):
            raise ValueError(f"expected {len(query)} targets, one an item, got shape {tuple(targets.shape)}")
        path = ridge_path(self.features(query.double(), keys.double(), mask), targets[:, None])
        if penalty is None:
            size = path.features.square().sum(dim=1).mean().item() / self.num_heads
            penalty = [size * each for each in PENALTIES]
        tried = list(penalty) if isinstance(penalty, Sequence) else [penalty]
        if not tried or not all(each >= 0 for each in tried):
            raise ValueError(f"a ridge penalty is a number that is not negative, or several; got {penalty}")
        errors = [path.leave_one_out(each * self.num_heads).square().mean().item() for each in tried]
        best = tried[errors.index(min(errors))]
        self.value.copy_(path.coefficients(best * self.num_heads).reshape_as(self.value))
        return best

    def kernel(
        self,
        query: Tensor,
        keys: Tensor,
        other_query: Tensor | None = None,
        other_keys: Tensor | None = None,
        mask: Tensor | None = None,
        other_mask: Tensor | None = None,
        assume_unit_norm: bool = False,
    ) -> Float[Tensor, "items others"]:
        """What ``Phi Phi^T / M`` tends to with the number of heads, for kernel ridge regression without drawing any.

        Args:
            assume_unit_norm: say so, to be warned where the inputs are not; the result holds for any norm.

        Raises:
            ValueError: biased heads or another activation than ReLU, which have no closed form; others without keys or
                without queries; what :meth:`forward` refuses.
        """
        if self.biased or self.activation != "relu":
            raise ValueError(
                "only unbiased heads with ReLU have a kernel in closed form: use features() with many heads"
            )
        if (other_query is None) != (other_keys is None):
            raise ValueError("other items have a query and keys: give both or neither")
        if other_query is None or other_keys is None:
            other_query, other_keys, other_mask = query, keys, mask
        self._check(query, keys, mask)
        self._check(other_query, other_keys, other_mask)
        if assume_unit_norm:
            reals = (k if m is None else k[m] for k, m in ((keys, mask), (other_keys, other_mask)))
            gap = max((x.norm(dim=-1) - 1).abs().max().item() for x in (query, other_query, *reals))
            if gap > 1e-3:
                warnings.warn(f"inputs are not of unit norm (off by up to {gap:.3g})", stacklevel=2)
        return infinite_width_kernel(query, keys, other_query, other_keys, mask, other_mask)

    def _check(self, query: Tensor, keys: Tensor, mask: Tensor | None) -> None:
        if keys.ndim != 3 or query.ndim != 2 or len(query) != len(keys):
            raise ValueError(
                "expected query (items, dim) and keys (items, keys, dim), "
                f"got {tuple(query.shape)} and {tuple(keys.shape)}"
            )
        if query.shape[1] != self.dim or keys.shape[2] != self.dim:
            raise ValueError(f"built for dim={self.dim}, got query and keys {query.shape[1]} and {keys.shape[2]} wide")
        if keys.shape[1] == 0:
            raise ValueError("every item needs at least one key")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"expected a boolean mask (True = real key), got {mask.dtype}")
        if mask is not None and mask.shape != keys.shape[:2]:
            raise ValueError(f"expected a mask of shape {tuple(keys.shape[:2])}, got {tuple(mask.shape)}")
        require_real_tokens(mask)
        if not torch.compiler.is_compiling():
            real = keys if mask is None else keys[mask]
            if not bool(query.isfinite().all() & real.isfinite().all()):
                raise ValueError("query or keys hold numbers that are not finite")
