"""Settings of a Qwen2-type language model whose layers attend in different ways."""

from __future__ import annotations

from typing import Any, no_type_check

from transformers import Qwen2Config

VARIANTS = ("standard", "mlp", "approximate", "non_approximate", "random_fixed", "text_fixed", "static")
FIXED = ("random_fixed", "text_fixed")
HYBRIDS = ("even", "odd", "top", "middle", "bottom", "quarter", "first", "last", "bilateral")
PAPER_SIZES = {
    "70M": (512, 2048, 6, 8),
    "160M": (768, 3072, 12, 12),
    "500M": (896, 4864, 24, 14),
    "1.7B": (2048, 6144, 28, 16),
}
"""Width, inner width of the feed-forward network, layers and heads of the paper's models."""


def standard_layers(hybrid: str, depth: int) -> tuple[int, ...]:
    """Which of ``depth`` layers, counted from 0, keep standard attention in a hybrid of the paper.

    Counted from 1 as in the paper, for 24 layers: ``even`` {2, 4, ..., 24}, ``odd`` {1, 3, ..., 23}, ``top`` {1-12},
    ``middle`` {1-6, 19-24}, ``bottom`` {13-24}, ``quarter`` {4, 8, ..., 24}, ``first`` {1}, ``last`` {24} and
    ``bilateral`` {1, 24}; other depths in proportion. (The paper's text has ``bottom`` replace six layers, its table
    twelve: the table is followed.)

    Raises:
        ValueError: an unknown name.
    """
    numbers = range(1, depth + 1)
    chosen = {
        "even": [n for n in numbers if n % 2 == 0],
        "odd": [n for n in numbers if n % 2 == 1],
        "top": [n for n in numbers if n <= depth // 2],
        "middle": [n for n in numbers if n <= depth // 4 or n > depth - depth // 4],
        "bottom": [n for n in numbers if n > depth // 2],
        "quarter": [n for n in numbers if n % 4 == 0],
        "first": [1],
        "last": [depth],
        "bilateral": [1, depth],
    }
    if hybrid not in chosen:
        raise ValueError(f"unknown hybrid {hybrid!r}; there are {', '.join(HYBRIDS)}")
    return tuple(sorted({n - 1 for n in chosen[hybrid]}))


def expand_variants(variants: str | list[str], depth: int, hybrid: str | None = None) -> list[str]:
    """One variant a layer: a name for all, a list of names, or a name that stands between a hybrid's standard layers.

    Raises:
        ValueError: an unknown name, a list that is not one name a layer, or a list together with a hybrid.
    """
    if isinstance(variants, str):
        kept = set(range(depth)) - set(standard_layers(hybrid, depth)) if hybrid is not None else set(range(depth))
        names = [variants if layer in kept else "standard" for layer in range(depth)]
        _known([variants])
    else:
        names = list(variants)
        if hybrid is not None:
            raise ValueError(f"hybrid={hybrid!r} goes with the name of one variant, got the list {names}")
        if len(names) != depth:
            raise ValueError(f"variants names {len(names)} layers, the model has {depth}")
    _known(names)
    return names


def _known(names: list[str]) -> None:
    unknown = sorted(set(names) - set(VARIANTS))
    if unknown:
        raise ValueError(f"unknown variant {', '.join(map(repr, unknown))}; there are {', '.join(VARIANTS)}")


@no_type_check  # run-time shape checks would take the keyword arguments from the host's dataclass
class DeconstructedQwen2Config(Qwen2Config):
    """A :class:`transformers.Qwen2Config` that also says how each layer attends.

    Args:
        variants: one name of :data:`VARIANTS` for all layers, or one a layer.
        hybrid: a name of :data:`HYBRIDS`; the layers that it lists are ``"standard"``, the others ``variants``. Only
            the list that comes of it is kept.
        taylor_form: of ``"approximate"``; see :mod:`cenote.ops.taylor_attention`.
        taylor_linear: linear-time form; ``False`` computes whole maps, which can then be returned.
        static_norm: of ``"static"``: the embeddings pass the layer's input norm before they become queries and keys.
            ``False`` is the paper's equation, ``True`` better conditioned (embeddings of standard deviation 0.02 give
            nearly flat maps).
        fixed_rows: longest sequence of ``"random_fixed"`` and ``"text_fixed"``; ``max_position_embeddings`` by
            default.
        fixed_std: standard deviation of the random embeddings; ``initializer_range`` by default, as the paper names
            none.
        qk_norm: RMS norm of the queries and keys of each head, as in Qwen3. It keeps the logits of
            ``"non_approximate"`` bounded, which otherwise diverge when all layers are of that kind; there it follows
            the SiLU.
        qkv_bias: biases of the query, key and value projections, as in Qwen2; Qwen3 has none.
        head_dim: width of a head; ``hidden_size / num_attention_heads`` by default.

    Raises:
        ValueError: variants that do not fit the layers, an unknown name or form, a width that the heads do not divide,
            query heads that the key heads do not divide, sliding windows.
    """

    model_type = "deconstructed_qwen2"

    variants: list[str] | str = "standard"
    hybrid: str | None = None
    taylor_form: str = "joint"
    taylor_linear: bool = True
    static_norm: bool = False
    fixed_rows: int | None = None
    fixed_std: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = True
    head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.variants = expand_variants(self.variants, self.num_hidden_layers, self.hybrid)
        self.hybrid = None
        if self.taylor_form not in ("joint", "diagonal"):
            raise ValueError(f"taylor_form must be 'joint' or 'diagonal', got {self.taylor_form!r}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        assert self.num_key_value_heads is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if set(self.layer_types or ()) - {"full_attention"}:
            raise ValueError(f"deconstructed layers have no sliding windows, got layer_types={self.layer_types}")
        if self.fixed_rows is None:
            self.fixed_rows = self.max_position_embeddings
        if self.fixed_rows < 1:
            raise ValueError(f"fixed_rows must be at least 1, got {self.fixed_rows}")

    @classmethod
    def paper_size(cls, size: str, **settings: Any) -> DeconstructedQwen2Config:
        """One of the paper's models: ``"70M"``, ``"160M"``, ``"500M"`` (Qwen2 hosts) or ``"1.7B"`` (Qwen3 host).

        The vocabulary is Pythia's (50304 with the usual rounding), embeddings are not tied, contexts hold 2048 tokens.
        """
        if size not in PAPER_SIZES:
            raise ValueError(f"unknown size {size!r}; there are {', '.join(PAPER_SIZES)}")
        width, inner, depth, heads = PAPER_SIZES[size]
        qwen3 = size == "1.7B"
        defaults: dict[str, Any] = {
            "vocab_size": 50304, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth,
            "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 2048,
            "tie_word_embeddings": False, "qk_norm": qwen3, "qkv_bias": not qwen3,
        }  # fmt: skip
        return cls(**{**defaults, **settings})

    @property
    def matched_mlp_width(self) -> int:
        """Inner width of an ``"mlp"`` layer's mixer, whose parameters come nearest to an attention layer's."""
        assert self.head_dim is not None
        assert self.num_key_value_heads is not None
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        parameters = 2 * self.hidden_size * (queries + keys)
        parameters += (queries + 2 * keys) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        return max(1, round(parameters / (3 * self.hidden_size)))
