"""The encoder of Whisper."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from cenote.backbones.base import LayerReducer
from cenote.backbones.collect import collect
from cenote.backbones.huggingface import Loaded
from cenote.backbones.huggingface_audio import HuggingFaceAudio
from cenote.backbones.waveform import waveforms
from cenote.types import Audio, Features


class EncoderAlone(WhisperEncoder):
    """Whisper's encoder, which may leave the decoder of a checkpoint where it is without a word."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", "proj_out"]  # noqa: RUF012 (as the library declares it)


class HuggingFaceWhisper(HuggingFaceAudio):
    """Log-mel spectrogram of a 30 s window through Whisper's encoder; the decoder is not even loaded.

    The network has no mask: it always sees the whole window, a shorter clip followed by silence, and so it was trained.
    It gives 1500 frames, each 320 samples (20 ms: a hop of 160, then a convolution of stride 2), of which
    ``Features.mask`` marks the first ``ceil(samples / 320)``, those that start within the clip. Clips beside it
    therefore never matter. The last hidden state is taken after the final norm.

    Args:
        loaded: the network.
        max_seconds: longer clips lose their end; the window's 30 s by default, and never more. A warning says once
            that a clip was longer than the window.

    Raises:
        ValueError: the repository has no feature extractor or one of another window, or ``max_seconds`` beyond it.
    """

    def __init__(self, loaded: Loaded, max_seconds: float | None = None) -> None:
        super().__init__(loaded, max_seconds)
        self.hop = 2 * self.extractor.hop_length
        self.window = self.extractor.n_samples / self.rate
        positions = loaded.config.max_source_positions
        if positions * self.hop != self.extractor.n_samples:
            raise ValueError(
                f"{self.spec} has {positions} frames of {self.hop} samples, but its feature extractor makes a window "
                f"of {self.extractor.n_samples} samples"
            )
        if max_seconds is not None and max_seconds > self.window:
            raise ValueError(f"{self.spec} sees {self.window:g} s at most, got max_seconds={max_seconds}")
        self._warned = False

    def frames(self, samples: Int[Tensor, "batch"]) -> Int[Tensor, "batch"]:
        """``ceil(n / 320)``, at most those of the window."""
        return (-(-samples // self.hop)).clamp(1, self.extractor.n_samples // self.hop)

    def collate(self, items: Sequence[Audio]) -> dict[str, Tensor]:
        """Clips through the checkpoint's own feature extractor.

        Returns:
            ``input_features`` ``(batch, mel bins, mel frames)`` of the whole window, and ``lengths`` ``(batch,)``,
            samples of each clip within it.

        Raises:
            TypeError, ValueError: see :func:`cenote.backbones.waveform.waveforms`.
        """
        clips = waveforms(items, self.rate, self.max_seconds, self.spec)
        longest = max(map(len, clips))
        if longest > self.extractor.n_samples and not self._warned:
            self._warned = True
            warnings.warn(
                f"a clip of {longest / self.rate:.1f} s loses its end: {self.spec} sees {self.window:g} s "
                "(max_seconds cuts without this warning)",
                stacklevel=2,
            )
        batch = self.extractor(clips, sampling_rate=self.rate, return_tensors="pt")
        lengths = torch.tensor([len(clip) for clip in clips]).clamp(max=self.extractor.n_samples)
        return {"input_features": batch["input_features"].float(), "lengths": lengths}

    def encode(self, batch: dict[str, Tensor], layers: tuple[int, ...], reduce: LayerReducer | None) -> Features:
        weight = next(self.module.parameters())
        spectrogram = batch["input_features"].to(device=weight.device, dtype=weight.dtype)
        frames = self.frames(batch["lengths"].to(weight.device))
        mask = torch.arange(self.loaded.config.max_source_positions, device=weight.device) < frames[:, None]
        return collect(lambda: (self.module(spectrogram).last_hidden_state, None), self.blocks, layers, reduce, mask)
