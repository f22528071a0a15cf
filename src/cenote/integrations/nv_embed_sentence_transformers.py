"""NV-Embed as the one module of a sentence-transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cenote.integrations.nv_embed_model import NVEmbed

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ImportError(f"this module needs sentence-transformers 6: pip install 'cenote[text]' ({error})") from None

__all__ = ["NVEmbedModule", "SentenceTransformer"]


class NVEmbedModule(InputModule):
    """Texts to ``sentence_embedding``; the prompt is the instruction.

    Saved in NV-Embed's own layout beside ``modules.json``; load it again with
    :func:`cenote.integrations.sentence_transformers.load_readout_model`.
    """

    def __init__(self, model: NVEmbed) -> None:
        super().__init__()
        self.model = model

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return self.model.text.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a row."""
        return self.model.text.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.model.text.max_length = value

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        text = self.model.text
        return text.collate(text.rows(list(inputs), prompt or "", options.get("max_length")))

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        names = ("input_ids", "attention_mask", "pool_mask")
        features["sentence_embedding"] = self.model(*(features[name] for name in names))
        return features

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return self.model.dim

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        self.model.save_pretrained(output_path)

    @classmethod
    def load(  # type: ignore[override]
        cls, model_name_or_path: str, subfolder: str = "", revision: str | None = None, **options: Any
    ) -> NVEmbedModule:
        source = Path(model_name_or_path)
        return cls(NVEmbed.from_pretrained(source / subfolder if source.is_dir() else source, revision=revision))
