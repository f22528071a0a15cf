"""What a head's weights do: its key-query and output-value matrices."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class HeadCircuits:
    """The four matrices of each head, from which its two circuits are formed.

    ``score(k, q) = scale * k^T KQ_h q`` with ``KQ_h = K_h^T Q_h``, and a token t that head h attends to adds
    ``OV_h t = O_h V_h t`` to the output. Leading axes (runs) are free. Biases, rotary positions, norms of queries and
    keys, and the norm before the layer are not part of the matrices.

    Attributes:
        query, key: ``(*runs, heads, head_dim, dim)``.
        value: ``(*runs, heads, value_dim, dim)``.
        output: ``(*runs, heads, out_dim, value_dim)``.
        scale: what the host multiplies scores by.
    """

    query: Float[Tensor, "*runs heads head_dim dim"]
    key: Float[Tensor, "*runs heads head_dim key_dim"]
    value: Float[Tensor, "*runs heads value_dim key_dim"]
    output: Float[Tensor, "*runs heads out_dim value_dim"]
    scale: float = 1.0

    @property
    def kq(self) -> Float[Tensor, "*runs heads key_dim dim"]:
        """``K_h^T Q_h``, rows for the key's token, columns for the query's; the scale is left out."""
        return self.key.mT @ self.query

    @property
    def ov(self) -> Float[Tensor, "*runs heads out_dim key_dim"]:
        """``O_h V_h``, rows for what is written, columns for what is read."""
        return self.output @ self.value


def split_heads(
    query: Float[Tensor, "query_width dim"],
    key: Float[Tensor, "key_width key_dim"],
    value: Float[Tensor, "value_width key_dim"],
    output: Float[Tensor, "out_dim output_width"],
    num_heads: int,
    num_key_value_heads: int | None = None,
    scale: float | None = None,
) -> HeadCircuits:
    """Circuits of merged projections, weights as ``nn.Linear`` keeps them, ``(out, in)``.

    Args:
        query: ``(num_heads * head_dim, dim)``.
        key, value: ``(num_key_value_heads * head_dim, dim)``; several queries share one where there are fewer of them.
        output: ``(out_dim, num_heads * value_dim)``.
        num_heads: heads H.
        num_key_value_heads: H by default.
        scale: of the scores; ``head_dim ** -0.5`` by default.

    Raises:
        ValueError: a width that does not split by the number of heads, or splits that disagree.
    """
    shared = num_heads if num_key_value_heads is None else num_key_value_heads
    if num_heads < 1 or shared < 1 or num_heads % shared:
        raise ValueError(f"key-value heads must divide the heads, got {num_heads} and {num_key_value_heads}")
    for name, width, heads in (
        ("query", len(query), num_heads),
        ("key", len(key), shared),
        ("value", len(value), shared),
        ("output", output.shape[1], num_heads),
    ):
        if width % heads:
            raise ValueError(f"the {name} projection's width {width} does not split into {heads} heads")
    head_dim, value_dim = len(query) // num_heads, len(value) // shared
    if len(key) // shared != head_dim or output.shape[1] // num_heads != value_dim:
        raise ValueError(
            f"heads of queries ({head_dim}) and keys ({len(key) // shared}), or of values ({value_dim}) and outputs "
            f"({output.shape[1] // num_heads}), differ in width"
        )
    copies = num_heads // shared
    return HeadCircuits(
        query.unflatten(0, (num_heads, -1)),
        key.unflatten(0, (shared, -1)).repeat_interleave(copies, dim=0),
        value.unflatten(0, (shared, -1)).repeat_interleave(copies, dim=0),
        output.unflatten(1, (num_heads, -1)).transpose(0, 1),
        head_dim**-0.5 if scale is None else scale,
    )
