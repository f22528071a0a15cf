"""Text encoders and decoders of the transformers library."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from cenote.backbones.base import LayerReducer
from cenote.backbones.collect import collect
from cenote.backbones.hooks import find_blocks
from cenote.backbones.huggingface import HuggingFaceBackbone, Loaded
from cenote.types import Features


class HuggingFaceText(HuggingFaceBackbone):
    """BERT and its kin (MiniLM, RoBERTa, DistilBERT, MPNet) and decoders (Llama, Mistral, Qwen).

    ``prefix`` is 1 where the tokenizer puts a class token (``[CLS]``, ``<s>``) in front, 0 for decoders. ``pooled`` is
    the network's ``pooler_output`` where the checkpoint has the weights for it.

    Args:
        loaded: the network.
        max_length: most tokens of a row, longer texts lose their end; as many as the network has positions by default.
        padding_side: ``"right"``, or ``"left"`` for networks without a class token (prefixes count from the left).

    Raises:
        ValueError: the repository has no tokenizer, or options that do not fit together.
    """

    modality = "text"

    def __init__(
        self, loaded: Loaded, max_length: int | None = None, padding_side: Literal["left", "right"] = "right"
    ) -> None:
        super().__init__(loaded)
        self.blocks = find_blocks(self.module, self.num_layers)
        self.tokenizer = _tokenizer(loaded)
        self._accepts = set(inspect.signature(self.module.forward).parameters)
        first = self.tokenizer("a")["input_ids"][:1]
        cls_token = self.tokenizer.cls_token_id
        self.prefix = int(cls_token is not None and first == [cls_token])
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        if padding_side == "left" and self.prefix:
            raise ValueError(f"{self.spec} has a class token, which must stand first in the row: pad on the right")
        self.tokenizer.padding_side = padding_side
        limit = _positions(loaded.config)
        known = [n for n in (limit, self.tokenizer.model_max_length) if n is not None and n < 10**9]
        if max_length is not None and not 1 <= max_length <= min(known, default=max_length):
            raise ValueError(f"max_length must lie in 1..{min(known, default='any')} for {self.spec}, got {max_length}")
        self.max_length: int | None = max_length or min(known, default=None)
        pooler = getattr(self.module, "pooler", None)
        self.pooled_dim = self.dim if pooler is not None and not loaded.lacks("pooler") else None

    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Texts through the checkpoint's own tokenizer, padded to the longest row.

        Raises:
            TypeError: an item that is not a string.
            ValueError: a text that gives no token at all.
        """
        for item in items:
            if not isinstance(item, str):
                raise TypeError(f"{self.spec} reads strings, got {type(item).__name__}")
        truncated = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        batch = dict(
            self.tokenizer(list(items), padding=True, return_tensors="pt", return_attention_mask=True, **truncated)
        )
        if batch["input_ids"].ndim < 2 or not batch["attention_mask"].bool().any(dim=1).all():
            empty = next(item for item in items if not self.tokenizer(item)["input_ids"])
            raise ValueError(f"{self.spec} finds no token in the text {empty!r}")
        if self.tokenizer.padding_side == "left" and "position_ids" in self._accepts:
            batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return batch

    def encode(self, batch: dict[str, Tensor], layers: tuple[int, ...], reduce: LayerReducer | None) -> Features:
        inputs: dict[str, Any] = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if "use_cache" in self._accepts:
            inputs["use_cache"] = False

        def run() -> tuple[Tensor, Tensor | None]:
            out = self.module(**inputs)
            pooled = getattr(out, "pooler_output", None)
            return out.last_hidden_state, pooled if self.pooled_dim is not None else None

        return collect(run, self.blocks, layers, reduce, inputs["attention_mask"].bool(), prefix=self.prefix)

    def token_strings(self, text: str) -> list[str]:
        """What each token of the row stands for, in order.

        Special tokens come as themselves; the others are the pieces of the text they cover, with the white space before
        them, so that joined they give the text back (up to truncation).
        """
        truncated = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        if not self.tokenizer.is_fast:
            return self.tokenizer.convert_ids_to_tokens(self.tokenizer(text, **truncated)["input_ids"])
        row = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, **truncated)
        names = self.tokenizer.convert_ids_to_tokens(row["input_ids"])
        strings, reached = [], 0
        for name, special, (_, end) in zip(names, row["special_tokens_mask"], row["offset_mapping"], strict=True):
            strings.append(name if special else text[reached:end])
            reached = reached if special else max(reached, end)
        return strings

    def transform_id(self) -> str:
        if self.tokenizer.is_fast:
            rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
            content: Any = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
        else:
            content = [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return f"tokenizer {digest[:32]} max_length={self.max_length} padding={self.tokenizer.padding_side}"


def _positions(config: Any) -> int | None:
    """How many tokens a row may have."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # positions of this family start behind the padding index
    return positions


def _tokenizer(loaded: Loaded) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(loaded.name, **loaded.source)
    except ImportError:
        raise
    except Exception as error:  # a missing or broken tokenizer surfaces as almost any type
        raise ValueError(f"{loaded.name!r} has no usable tokenizer beside the weights: {error}") from error
    if tokenizer.pad_token is None:
        # Padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"the tokenizer of {loaded.name!r} has neither a padding token nor another special token to pad with"
        )
    return tokenizer
