"""Settings of PoNet models for transformers."""

from __future__ import annotations

from typing import Any

from transformers import BertConfig, PreTrainedTokenizerBase


class PoNetConfig(BertConfig):
    """BERT's settings under BERT's names, and those of PoNet's own.

    Args:
        clsgsepg: the leak guard: class and separator tokens are left out of the segment and local poolings.
        special_token_ids: ids of class and separator token, by which special tokens are found where no
            ``special_mask`` is given. The default is that of the published English vocabulary; other tokenizers need
            their own (:meth:`for_tokenizer`).
        num_segment_labels: answers of the sentence structure objective.
        **settings: as of :class:`transformers.BertConfig`; the defaults are those of the published base model.

    Raises:
        ValueError: a decoder, cross-attention: there is no causal form.
    """

    model_type = "ponet"

    def __init__(
        self,
        clsgsepg: bool = True,
        special_token_ids: list[int] | tuple[int, ...] = (101, 102),
        num_segment_labels: int = 3,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if self.is_decoder or self.add_cross_attention:
            raise ValueError("PoNet sees later tokens and cannot be a decoder or attend to an encoder")
        self.clsgsepg = clsgsepg
        self.special_token_ids = [int(each) for each in special_token_ids]
        self.num_segment_labels = num_segment_labels

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PoNetConfig:
        """Settings with the tokenizer's vocabulary, padding, class and separator token.

        Raises:
            ValueError: a tokenizer without class, separator or padding token.
        """
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad")}
        missing = [name for name, value in ids.items() if value is None]
        if missing:
            raise ValueError(f"the tokenizer has no {' and no '.join(missing)} token")
        own = {"vocab_size": len(tokenizer), "pad_token_id": ids["pad"], "special_token_ids": [ids["cls"], ids["sep"]]}
        return cls(**{**own, **settings})
