"""Backbones of the transformers library, loaded the normal way."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cenote.backbones.base import Backbone
from cenote.backbones.fingerprint import weights_digest
from cenote.backbones.options import built

KNOWN = (
    "BAAI/bge-base-en-v1.5", "FacebookAI/roberta-base", "FacebookAI/xlm-roberta-base", "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-0.6B", "Qwen/Qwen3-Embedding-0.6B", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "bert-base-cased",
    "bert-base-uncased", "distilbert-base-uncased", "facebook/deit-base-patch16-224", "facebook/dinov2-base",
    "facebook/dinov2-small", "facebook/dinov2-with-registers-base", "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "facebook/dinov3-vits16-pretrain-lvd1689m", "facebook/hubert-base-ls960", "facebook/hubert-large-ll60k",
    "facebook/vit-mae-base", "facebook/vit-mae-large", "facebook/wav2vec2-base", "facebook/wav2vec2-large-lv60",
    "google/siglip-base-patch16-224", "google/siglip2-base-patch16-224", "google/vit-base-patch16-224",
    "google/vit-base-patch16-224-in21k", "meta-llama/Llama-3.2-1B", "microsoft/beit-base-patch16-224",
    "microsoft/mpnet-base", "microsoft/wavlm-base-plus", "microsoft/wavlm-large", "mistralai/Mistral-7B-v0.1",
    "openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32", "openai/whisper-base", "openai/whisper-tiny",
    "roberta-base", "sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-mpnet-base-v2",
)  # fmt: skip
"""Ids offered when a name is mistyped; any other id of the hub loads just as well."""

# Weights that a checkpoint may lack without harm to hidden states: parts behind the blocks, and what training needs.
BESIDE_THE_BLOCKS = (
    "pooler",
    "head.",
    "mask_token",
    "masked_spec_embed",
    "visual_projection",
    "text_projection",
    "logit_",
    "text_model",
    "decoder.",
)


@dataclass
class Loaded:
    """A network as transformers gave it.

    Attributes:
        name: hub id or folder.
        module: the network, or the vision tower of a two-tower checkpoint.
        config: its configuration.
        missing: names of weights the checkpoint lacked, which are therefore random.
        source: keywords for further ``from_pretrained`` calls of the same repository.
        bidirectional: whether a causal mask was lifted.
    """

    name: str
    module: nn.Module
    config: Any
    missing: tuple[str, ...]
    source: dict[str, Any] = field(default_factory=dict)
    bidirectional: bool = False

    def lacks(self, part: str) -> bool:
        """Whether any weight of the named part is random because the checkpoint had none."""
        return any(part in name for name in self.missing)


class HuggingFaceBackbone(Backbone):
    """What vision, text and speech networks of transformers share.

    Hidden states 0 to ``num_layers - 1`` are what enters and leaves the blocks; the last one is the network's own
    ``last_hidden_state``: after the final norm where the class has one (ViT, MAE, DINO, SigLIP, Llama, ...), the plain
    output of the last block where it has none (BERT family, CLIP vision tower).
    """

    def __init__(self, loaded: Loaded) -> None:
        self.spec = f"hf:{loaded.name}"
        self.loaded = loaded
        self.module = loaded.module.eval().requires_grad_(False)
        self.dim = loaded.config.hidden_size
        self.num_layers = loaded.config.num_hidden_layers
        self._digest: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the first weights are, and so where the input must be."""
        return next(self.module.parameters()).device

    def fingerprint(self) -> str:
        """The hub's commit where there is one (weights need not be read again), else a digest of the weights."""
        if self._digest is None:
            config, commit = self.loaded.config, getattr(self.loaded.config, "_commit_hash", None)
            settings = {
                "class": type(self.module).__name__,
                "dtype": str(next(self.module.parameters()).dtype),
                "bidirectional": self.loaded.bidirectional,
            }
            if commit:
                settings |= {"id": self.loaded.name, "commit": commit}
                self._digest = weights_digest(nn.Identity(), settings)
            else:
                volatile = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
                settings |= {key: value for key, value in config.to_dict().items() if key not in volatile}
                self._digest = weights_digest(self.module, settings)
        return self._digest


def load_huggingface(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    bidirectional: bool = False,
    **options: Any,
) -> Backbone:
    """Load a network through ``AutoConfig``, ``AutoModel`` and the processor, tokenizer or feature extractor beside it.

    See :func:`cenote.backbones.load_backbone` for the arguments. ``options`` are those of
    :class:`~cenote.backbones.huggingface_vision.HuggingFaceVision` (``image_size``),
    :class:`~cenote.backbones.huggingface_text.HuggingFaceText` (``max_length``, ``padding_side``) or
    :class:`~cenote.backbones.huggingface_audio.HuggingFaceAudio` (``max_seconds``).
    """
    loaded = load_network(name, revision, dtype, device_map, trust_remote_code)
    if device is not None:
        loaded.module.to(device)
    kind = getattr(loaded.module, "main_input_name", None)
    if bidirectional and kind != "input_ids":
        seen = "a vision network" if kind == "pixel_values" else f"a {type(loaded.module).__name__}"
        raise ValueError(f"bidirectional applies to causal language models, and {name!r} is {seen}")
    if kind == "pixel_values":
        from cenote.backbones.huggingface_vision import HuggingFaceVision

        return built(HuggingFaceVision, f"hf:{name}", loaded, **options)
    if kind == "input_ids" and not getattr(loaded.config, "is_encoder_decoder", False):
        from cenote.backbones.huggingface_text import HuggingFaceText

        if bidirectional:
            from cenote.backbones.bidirectional import make_bidirectional

            changed = make_bidirectional(loaded.module)
            loaded.module = loaded.module if changed is None else changed
            loaded.bidirectional = True
        return built(HuggingFaceText, f"hf:{name}", loaded, **options)
    if kind == "input_features" and loaded.config.model_type == "whisper":
        from cenote.backbones.huggingface_whisper import HuggingFaceWhisper

        return built(HuggingFaceWhisper, f"hf:{name}", loaded, **options)
    from cenote.backbones.huggingface_audio import WAVEFORM_FAMILIES, HuggingFaceWaveform

    if loaded.config.model_type in WAVEFORM_FAMILIES:
        return built(HuggingFaceWaveform, f"hf:{name}", loaded, **options)
    raise ValueError(
        f"{name!r} is a {type(loaded.module).__name__}: a backbone is a vision encoder, a text encoder or decoder, "
        f"or a speech encoder ({', '.join(WAVEFORM_FAMILIES)}, whisper)"
    )


def load_network(
    name: str, revision: str | None, dtype: torch.dtype | None, device_map: Any, trust_remote_code: bool
) -> Loaded:
    """``AutoModel.from_pretrained``, the vision tower of a two-tower checkpoint, and a look at what was missing.

    Of Whisper only the encoder is loaded.
    """
    from transformers import AutoConfig, AutoModel

    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    placed = {key: value for key, value in (("dtype", dtype), ("device_map", device_map)) if value is not None}
    try:
        config = AutoConfig.from_pretrained(name, **source)
        auto: Any = AutoModel
        if getattr(config, "model_type", None) == "whisper":
            from cenote.backbones.huggingface_whisper import EncoderAlone

            auto, placed["key_mapping"] = EncoderAlone, {r"^(?:model\.)?encoder\.": ""}
        module, info = auto.from_pretrained(name, config=config, output_loading_info=True, **placed, **source)
    except OSError as error:
        raise ValueError(_not_found(name, error)) from error
    except ImportError:
        raise
    except (ValueError, KeyError) as error:
        raise ValueError(_not_found(name, error)) from error
    missing = tuple(sorted(info["missing_keys"]))
    if hasattr(module, "vision_model") and hasattr(config, "vision_config") and hasattr(config, "text_config"):
        module = module.vision_model
    commit = getattr(config, "_commit_hash", None)
    config = module.config  # the network's own copy, which is the one its forward reads
    config._commit_hash = commit
    random = [key for key in missing if not any(part in key for part in BESIDE_THE_BLOCKS)]
    if random:
        raise ValueError(
            f"{name!r} lacks {len(random)} weights of a {type(module).__name__} ({', '.join(random[:3])}, ...): "
            "its hidden states would be partly random"
        )
    return Loaded(name, module, config, missing, source)


def _not_found(name: str, error: Exception) -> str:
    """One line: what could not be loaded, and names that are near."""
    path = Path(name).expanduser()
    reason = str(error).strip().splitlines()[0]
    if path.is_dir():
        return f"{name!r} is not a folder written by save_pretrained: {reason}"
    if not isinstance(error, OSError):
        return f"transformers cannot load {name!r}: {reason}"
    siblings = [str(entry) for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    near = difflib.get_close_matches(str(path) if local else name, siblings if local else KNOWN, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    what = "there is no folder" if local else "there is no folder or reachable hub repository"
    return f"unknown backbone: {what} {name!r}{hint}"
