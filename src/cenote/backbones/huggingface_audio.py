"""Speech encoders of the transformers library that read the waveform."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cenote.backbones.base import LayerReducer
from cenote.backbones.collect import collect
from cenote.backbones.hooks import find_blocks
from cenote.backbones.huggingface import HuggingFaceBackbone, Loaded
from cenote.backbones.waveform import RESAMPLER, check_max_seconds, times, waveforms
from cenote.types import Audio, Features

WAVEFORM_FAMILIES = (
    "data2vec-audio", "hubert", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-conformer", "wavlm",
)  # fmt: skip
"""Model types that :class:`HuggingFaceWaveform` serves."""

PADDING_INVARIANT = ("hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm")
"""Those of them that a mask shields from padding, given a feature encoder with layer norm."""


class HuggingFaceAudio(HuggingFaceBackbone):
    """What the speech encoders share: their feature extractor, their rate, and the times of their frames.

    Clips are resampled to the rate of the feature extractor by soxr. There is no class token, grid or pooled output.
    """

    modality = "audio"
    hop: int
    """Samples between two frames."""

    def __init__(self, loaded: Loaded, max_seconds: float | None = None) -> None:
        super().__init__(loaded)
        self.blocks = find_blocks(self.module, self.num_layers)
        self.extractor = _feature_extractor(loaded)
        self.extractor.padding_side = "right"
        self.rate: int = self.extractor.sampling_rate
        self.max_seconds = check_max_seconds(max_seconds, self.rate)

    @abstractmethod
    def frames(self, samples: Int[Tensor, "batch"]) -> Int[Tensor, "batch"]:
        """How many frames stand for so many samples at the backbone's rate."""

    def token_strings(self, item: Audio) -> list[str]:
        """Where each frame starts, in seconds: ``"0.02 s"``."""
        (samples,) = waveforms([item], self.rate, self.max_seconds, self.spec)
        return times(int(self.frames(torch.tensor([len(samples)]))[0]), self.hop, self.rate)

    def transform_id(self) -> str:
        settings = {key: value for key, value in self.extractor.to_dict().items() if not key.startswith("_")}
        own = {"resampler": RESAMPLER, "max_seconds": self.max_seconds}
        return json.dumps({**own, **settings}, sort_keys=True, default=str)


class HuggingFaceWaveform(HuggingFaceAudio):
    """wav2vec 2.0, HuBERT, WavLM, UniSpeech(-SAT), data2vec-audio and wav2vec 2.0 Conformer.

    Convolutions turn samples into frames, one each 320 samples (20 ms) in all published checkpoints, a transformer
    follows. The network gets the mask at the rate of the *samples* and derives that of its frames itself;
    ``Features.mask`` is at the rate of the *frames*, by the same arithmetic. (The official L-TDNN code passes a mask of
    frames to the network, which then takes nearly all padding for speech.)

    A clip's features never depend on the clips beside it. Networks whose feature encoder has layer norms encode a
    padded batch in one go. The others would leak: group norm in the feature encoder averages over padding too (so these
    checkpoints were trained without a mask), and so does what follows the first of several positional convolutions
    (data2vec-audio) or a batch norm before it (some HuBERTs). There the clips of a batch that have one length are
    encoded together, without padding and without a mask; batches of one length are therefore the fast ones.

    Waveforms are normalised over the real samples only, where the checkpoint's feature extractor normalises. A clip
    shorter than the network's receptive field (400 samples, 25 ms) is padded with zeros up to it after that, and gives
    one frame. An adapter behind the encoder is taken off: all hidden states are at one rate.

    Args:
        loaded: the network.
        max_seconds: longer clips lose their end; no limit by default (attention is quadratic in the length).

    Raises:
        ValueError: the repository has no feature extractor, or ``max_seconds`` below one sample.
    """

    def __init__(self, loaded: Loaded, max_seconds: float | None = None) -> None:
        super().__init__(loaded, max_seconds)
        config = loaded.config
        if getattr(self.module, "adapter", None) is not None:
            self.module.adapter = None  # type: ignore[assignment]
        self.kernels, self.strides = tuple(config.conv_kernel), tuple(config.conv_stride)
        self.receptive_field, self.hop = 1, 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            self.receptive_field = (self.receptive_field - 1) * stride + kernel
            self.hop *= stride
        self.pads = (
            config.model_type in PADDING_INVARIANT
            and config.feat_extract_norm == "layer"
            and not getattr(config, "conv_pos_batch_norm", False)
        )

    def frames(self, samples: Int[Tensor, "batch"]) -> Int[Tensor, "batch"]:
        """``floor((n - kernel) / stride) + 1`` through all convolutions; one for what is below the receptive field."""
        counts = samples.clamp(min=self.receptive_field)
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            counts = (counts - kernel) // stride + 1
        return counts

    def collate(self, items: Sequence[Audio]) -> dict[str, Tensor]:
        """Clips through the checkpoint's own feature extractor, padded to the longest.

        Returns:
            ``input_values`` ``(batch, samples)`` and ``attention_mask`` ``(batch, samples)``, 1 for a real sample.

        Raises:
            TypeError, ValueError: see :func:`cenote.backbones.waveform.waveforms`.
        """
        clips = waveforms(items, self.rate, self.max_seconds, self.spec)
        batch = self.extractor(
            clips, sampling_rate=self.rate, padding=True, return_attention_mask=True, return_tensors="pt"
        )
        values, mask = batch["input_values"].float(), batch["attention_mask"]
        lacking = self.receptive_field - values.shape[1]
        if lacking > 0:
            values, mask = (torch.nn.functional.pad(tensor, (0, lacking)) for tensor in (values, mask))
        mask[:, : self.receptive_field] = 1
        return {"input_values": values, "attention_mask": mask}

    def encode(self, batch: dict[str, Tensor], layers: tuple[int, ...], reduce: LayerReducer | None) -> Features:
        values, mask = batch["input_values"], batch["attention_mask"]
        if mask.shape != values.shape:
            raise ValueError(
                f"attention_mask must say which samples are real, {tuple(values.shape)}, got {tuple(mask.shape)}: "
                "a mask of frames does not fit here"
            )
        lengths = mask.sum(dim=1).cpu()
        if int(lengths.min()) < self.receptive_field:
            raise ValueError(
                f"every row needs at least {self.receptive_field} samples ({self.spec}), got {int(lengths.min())}"
            )
        if self.pads:
            return self._encode(values, lengths, layers, reduce)
        groups = [(lengths == length).nonzero().flatten() for length in lengths.unique()]
        parts = [self._encode(values[rows.to(values.device)], lengths[rows], layers, reduce) for rows in groups]
        return _scatter(groups, parts, len(values))

    def _encode(
        self, values: Tensor, lengths: Tensor, layers: tuple[int, ...], reduce: LayerReducer | None
    ) -> Features:
        weight = next(self.module.parameters())
        longest = int(lengths.max())
        inputs: dict[str, Any] = {"input_values": values[:, :longest].to(device=weight.device, dtype=weight.dtype)}
        frames = self.frames(lengths)
        mask = torch.arange(int(frames.max())) < frames[:, None]
        if int(lengths.min()) < longest:
            real = torch.arange(longest) < lengths[:, None]
            inputs["attention_mask"] = real.long().to(weight.device)
        return collect(
            lambda: (self.module(**inputs).last_hidden_state, None),
            self.blocks, layers, reduce, mask.to(weight.device),
        )  # fmt: skip


def _scatter(groups: Sequence[Tensor], parts: Sequence[Features], items: int) -> Features:
    """Features of groups of rows as those of one batch, padded with zeros."""
    first = parts[0]
    if len(parts) == 1:
        return first
    tokens = [part.hidden.shape[2] for part in parts]
    hidden = first.hidden.new_zeros(items, first.hidden.shape[1], max(tokens), first.hidden.shape[3])
    mask = torch.zeros(items, max(tokens), dtype=torch.bool, device=hidden.device)
    for rows, part, count in zip(groups, parts, tokens, strict=True):
        hidden[rows, :, :count] = part.hidden
        mask[rows, :count] = True  # within a group there is no padding
    return Features(hidden, mask, first.layers)


def _feature_extractor(loaded: Loaded) -> Any:
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(loaded.name, **loaded.source)
    except ImportError:
        raise
    except Exception as error:  # a missing or broken file surfaces as almost any type
        raise ValueError(
            f"{loaded.name!r} has no usable feature extractor beside the weights (preprocessor_config.json)"
        ) from error
