"""NV-Embed as a model: a bidirectional decoder whose tokens latent attention pools, for texts behind instructions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.backbones.bidirectional import make_bidirectional
from cenote.integrations.nv_embed import HEAD, HOST, assemble
from cenote.integrations.nv_embed_files import local_folder, read_config, read_weights, write_model
from cenote.integrations.nv_embed_text import InstructedTokenizer
from cenote.pooling.cross_block import reference_names
from cenote.pooling.latent_attention import LatentAttention

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class NVEmbed(nn.Module):
    """``vector = LatentAttention(decoder(instruction + text + EOS), mask without the instruction)``.

    The decoder (Llama, Mistral, Qwen2, Qwen3, ...) attends in both directions; its states after the final norm are
    pooled by :class:`~cenote.pooling.latent_attention.LatentAttention` over the real tokens that are not the
    instruction, which the other tokens do see. Source: "NV-Embed: Improved Techniques for Training LLMs as Generalist
    Embedding Models" (arXiv 2405.17428).

    Otherwise than in the official code, with the same vectors: it runs with current transformers and any attention
    kernel, latents are projected once (and folded into smaller matrices where that pays) instead of once a sequence,
    padding may be on either side, a text that is cut off keeps its end-of-sequence token, and a row with nothing to
    pool is refused instead of NaN. The published weights are under a non-commercial licence and not part of this
    library.

    Args:
        embedding_model: a transformers decoder without its language-model head; made bidirectional in place.
        latent_attention_model: the pooling, of the decoder's width.
        tokenizer: of the decoder.
        exact_instruction_mask: leave out begin of sequence and the whole instruction. ``False`` lets the instruction's
            last token into the mean, as published weights were trained.
        mask_instruction: whether instructions are left out of the pooling at all.
        add_eos: append the end-of-sequence token.
        max_length: most tokens of a row; ``None`` takes what tokenizer and decoder allow.
        padding_side: where rows are filled up.

    Raises:
        ValueError: widths that differ, an unknown kind of decoder, a tokenizer without end of sequence.
    """

    def __init__(
        self,
        embedding_model: nn.Module,
        latent_attention_model: LatentAttention,
        tokenizer: Any,
        *,
        exact_instruction_mask: bool = True,
        mask_instruction: bool = True,
        add_eos: bool = True,
        max_length: int | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> None:
        super().__init__()
        config: Any = make_bidirectional(embedding_model).config
        if config.hidden_size != latent_attention_model.dim:
            widths = f"{latent_attention_model.dim}, the decoder gives {config.hidden_size}"
            raise ValueError(f"the pooling reads tokens of width {widths}")
        self.embedding_model, self.latent_attention_model = embedding_model, latent_attention_model
        limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))
        self.text = InstructedTokenizer(
            tokenizer, max_length or limit, exact=exact_instruction_mask, mask_instruction=mask_instruction,
            add_eos=add_eos, padding_side=padding_side,
        )  # fmt: skip

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.latent_attention_model.out_dim

    @property
    def device(self) -> torch.device:
        """Where the input must be."""
        return next(self.embedding_model.parameters()).device

    def states(
        self, input_ids: Int[Tensor, "batch tokens"], attention_mask: Tensor
    ) -> Float[Tensor, "batch tokens dim"]:
        """Hidden states after the final norm; those of padding mean nothing."""
        out = self.embedding_model(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False)
        return out.last_hidden_state

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Tensor,
        pool_mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Vectors of tokenized rows; ``pool_mask`` is ``True`` for what is pooled of the real tokens, else all are."""
        mask = attention_mask.bool()
        mask = mask if pool_mask is None else mask & pool_mask
        states = self.states(input_ids, attention_mask)
        return self.latent_attention_model(states.to(self.latent_attention_model.block.latents.dtype), mask)

    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str = "",
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        show_progress_bar: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
    ) -> np.ndarray | Tensor:
        """Vectors of texts, ``(texts, dim)`` in float32 in the order given; ``(dim,)`` for a single text.

        Args:
            texts: one or several.
            instruction: in front of every text, see :func:`~cenote.integrations.nv_embed_text.query_instruction`;
                ``""`` for passages.
            batch_size: rows in one pass; rows of like length go together.
            max_length: most tokens of a row, in place of the model's own limit.
            show_progress_bar: on standard error.
            convert_to_numpy: a NumPy array.
            convert_to_tensor: a tensor on the model's device instead.

        Raises:
            TypeError: texts that are not strings.
            ValueError: a text of which nothing is left behind the instruction, a ``batch_size`` below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        from rich.console import Console
        from rich.progress import track

        rows = self.text.rows([texts] if isinstance(texts, str) else texts, instruction, max_length)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))  # the largest batch first: it fits or not
        vectors = torch.zeros(len(rows), self.dim, device=self.device if convert_to_tensor else "cpu")
        training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                for start in track(
                    range(0, len(rows), batch_size), "encoding", disable=not show_progress_bar,
                    console=Console(stderr=True),
                ):  # fmt: skip
                    some = order[start : start + batch_size]
                    batch = self.text.collate([rows[i] for i in some])
                    found = self(**{name: tensor.to(self.device) for name, tensor in batch.items()})
                    vectors[some] = found.float().to(vectors.device)
        finally:
            self.train(training)
        if isinstance(texts, str):
            vectors = vectors[0]
        return vectors if convert_to_tensor or not convert_to_numpy else vectors.numpy()

    @classmethod
    def from_decoder(
        cls,
        model: nn.Module,
        tokenizer: Any,
        *,
        num_latents: int = 512,
        num_heads: int = 8,
        head_dim: int | None = None,
        normalize: bool = True,
        **options: Any,
    ) -> NVEmbed:
        """Put a fresh pooling on a decoder, to be trained.

        Args:
            model: a transformers decoder, with its language-model head or without.
            tokenizer: of the decoder.
            num_latents, num_heads, head_dim, normalize: of the pooling; the released one has 512 latents and 8 heads as
                wide as the decoder.
            **options: of the constructor.
        """
        decoder = getattr(model, "base_model", model)
        config: Any = decoder.config
        pooling = LatentAttention(config.hidden_size, num_latents, num_heads, head_dim, normalize)
        first = next(decoder.parameters())
        return cls(decoder, pooling.to(first.device, first.dtype), tokenizer, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> NVEmbed:
        """Load the published layout, in eval mode. Weights come shard by shard into their places, so that memory holds
        the model once; code that a repository brings is never run.

        Args:
            source: a folder, or a hub id such as ``"nvidia/NV-Embed-v2"``.
            revision: branch, tag or commit of the repository.
            dtype: of the weights; ``None`` keeps the stored one.
            device: where they go.
            **options: of the constructor, in place of what the configuration says. A configuration without
                ``exact_instruction_mask``, as published, means the published mask.

        Raises:
            ValueError: no such files, or files that do not fit together.
        """
        from transformers import AutoTokenizer, PretrainedConfig

        folder = local_folder(source, revision)
        config = read_config(folder)
        model, pooling = assemble(read_weights(folder, dtype, device), config)
        # An empty configuration: the tokenizer's own files say what it is. Asked about "nvembed" transformers warns,
        # and told the decoder's type it may put that type's usual rules in place of those that were saved.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=PretrainedConfig(), trust_remote_code=False)
        kept = {
            "exact_instruction_mask": config.get("exact_instruction_mask", False),
            "mask_instruction": config.get("is_mask_instruction", True),
            "add_eos": config.get("add_eos", True),
            "padding_side": config.get("padding_side", "right"),
            "max_length": config.get("max_length"),
        }
        return cls(model, pooling, tokenizer, **{**kept, **options}).eval()

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> Path:
        """Write the published layout: key names, shards with an index, nested configuration, tokenizer.

        Raises:
            ValueError: LoRA weights that are not merged (:meth:`merge_lora`).
        """
        if hasattr(self.embedding_model, "peft_config"):
            raise ValueError("LoRA weights have no place in the published layout: merge_lora() first")
        official = {own: name for name, own in reference_names().items()}
        state = {f"{HOST}.{name}": value for name, value in self.embedding_model.state_dict().items()}
        pooled = self.latent_attention_model.state_dict()
        state |= {f"{HEAD}.{official[name]}": value for name, value in pooled.items()}
        self.text.tokenizer.save_pretrained(folder)
        write_model(folder, state, self.config(), max_shard_size)
        return Path(folder)

    def config(self) -> dict[str, Any]:
        """The nested configuration in published names, and ``exact_instruction_mask``."""
        text = json.loads(self.embedding_model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
        # The published kind of this one decoder; the others are new.
        text["model_type"] = {"mistral": "bidir_mistral"}.get(text["model_type"], text["model_type"])
        block = self.latent_attention_model.block
        latents, dim = block.latents.shape
        return {
            "architectures": ["NVEmbedModel"],
            "model_type": "nvembed",
            "text_config": text,
            "latent_attention_config": {
                "model_type": "latent_attention",
                "num_latents_value": latents,
                "num_cross_heads": block.num_heads,
                "hidden_dim": dim,
                "latent_dim": dim,
                "cross_dim_head": block.head_dim,
                "output_normalize": self.latent_attention_model.normalize,
            },
            "padding_side": self.text.padding_side,
            "is_mask_instruction": self.text.mask_instruction,
            "exact_instruction_mask": self.text.exact,
            "add_eos": self.text.add_eos,
            "add_pad_token": True,
            "mask_type": "b",
            "max_length": self.text.max_length,
        }

    def add_lora(self, rank: int = 16, alpha: int = 32, dropout: float = 0.1) -> NVEmbed:
        """Freeze the decoder and train low-rank updates of its projections instead, as published; the pooling is
        trained whole. Needs peft.

        Projections are all linear layers of the decoder, those of attention and of the feed-forward blocks.

        Raises:
            ValueError: a decoder with experts (Mixtral), whose stacked weights are no linear layers.
        """
        if any(parameter.ndim > 2 for parameter in self.embedding_model.parameters()):
            kind = self.embedding_model.config.model_type  # type: ignore[union-attr]
            raise ValueError(
                f"the experts of {kind} are stacked in one weight, which LoRA would leave out: use a dense decoder"
            )
        targets = [name for name, module in self.embedding_model.named_modules() if isinstance(module, nn.Linear)]
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError(f"LoRA needs peft: pip install 'cenote[tune]' ({error})") from None
        settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
        self.embedding_model = get_peft_model(self.embedding_model, settings)
        return self

    def merge_lora(self) -> NVEmbed:
        """Add the low-rank updates to the decoder's weights, which is then a plain decoder again."""
        decoder: Any = self.embedding_model
        self.embedding_model = decoder.merge_and_unload()
        return self

    def to_sentence_transformer(self, prompts: dict[str, str] | None = None) -> SentenceTransformer:
        """The same weights as a model of sentence-transformers, to encode and to train with its trainer and losses; its
        prompts are the instructions."""
        from cenote.integrations.nv_embed_sentence_transformers import NVEmbedModule, SentenceTransformer

        return SentenceTransformer(modules=[NVEmbedModule(self)], prompts=prompts, device=str(self.device))
