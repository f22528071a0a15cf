"""The keyword transformer: a small speech network over the cepstra of one second."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cenote.backbones.base import Backbone, LayerReducer
from cenote.backbones.collect import collect
from cenote.backbones.fingerprint import weights_digest
from cenote.backbones.waveform import RESAMPLER, times, waveforms
from cenote.types import Audio, Features

WEIGHTS, SETTINGS = "model.safetensors", "config.json"


class Cepstra(nn.Module):
    """``DCT log max(mel |rfft(window · frame)|, floor)`` of overlapping frames, ``(batch, frames, cepstra)``.

    All three matrices come with the weights. Frames are not padded: n samples give ``(n - window) // stride + 1``.
    """

    window: Tensor
    mel: Tensor
    dct: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.stride, self.points, self.floor = config["stride_samples"], config["n_fft"], config["log_floor"]
        self.register_buffer("window", torch.empty(config["window_samples"]))
        self.register_buffer("mel", torch.empty(config.get("num_mel", 80), config["fft_bins"]))
        self.register_buffer("dct", torch.empty(config["num_mfcc"], config.get("num_mel", 80)))

    def forward(self, samples: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch frames cepstra"]:
        frames = samples.unfold(1, len(self.window), self.stride) * self.window
        magnitude = torch.fft.rfft(frames, n=self.points).abs()[..., : self.mel.shape[1]]
        return (magnitude @ self.mel.T).clamp(min=self.floor).log() @ self.dct.T


class KeywordTransformer(nn.Module):
    """Cepstra to tokens, a class token in front, learned positions, a post-norm BERT encoder.

    Keys of the state dict: ``frontend.{window,mel,dct}``, ``patch``, ``cls``, ``pos``, ``encoder.layer.N`` (those of
    transformers' ``BertEncoder``) and ``head``, which maps the class token to keywords and is not used here.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertEncoder

        settings = BertConfig(**config["encoder_config"])
        settings._attn_implementation = "sdpa"
        dim = settings.hidden_size
        self.frontend = Cepstra(config)
        self.patch = nn.Linear(config["num_mfcc"], dim)
        self.cls = nn.Parameter(torch.empty(1, 1, dim))
        self.pos = nn.Parameter(torch.empty(1, config["num_tokens"], dim))
        self.encoder = BertEncoder(settings)
        self.head = nn.Linear(dim, config["num_labels"])

    def forward(self, samples: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch tokens dim"]:
        # The front end takes logarithms of small numbers: float32 whatever the weights are.
        cepstra = self.frontend(samples).to(self.patch.weight.dtype)
        tokens = torch.cat([self.cls.expand(len(cepstra), -1, -1), self.patch(cepstra)], dim=1)
        return self.encoder(tokens + self.pos).last_hidden_state


class KeywordTransformerBackbone(Backbone):
    """The keyword transformer of Berg, O'Connor and Cruz (arXiv 2104.00769): a class token and 98 frames of 10 ms.

    The network was trained on clips of one second at 16 kHz and reads exactly that: a shorter clip stands in the middle
    of silence, of a longer one the middle is taken. It has no mask and was trained on such silence, so all 99 tokens
    count as real. Its front end does not level the volume; clips are scaled to a peak of 0.5 unless told otherwise.

    Args:
        folder: with ``model.safetensors`` and ``config.json`` (see :class:`KeywordTransformer` for the keys).
        device: where to run.
        dtype: of the weights; float32 unless given.
        peak: largest magnitude that a clip is scaled to; ``None`` leaves clips as they are.

    Raises:
        ValueError: no such folder, files that do not describe a keyword transformer, or ``peak`` outside (0, 1].
    """

    modality = "audio"
    module: KeywordTransformer
    prefix = 1

    def __init__(
        self,
        folder: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        peak: float | None = 0.5,
    ) -> None:
        if peak is not None and not 0 < peak <= 1:
            raise ValueError(f"peak must lie in (0, 1], or be None, got {peak}")
        self.spec, self.peak = f"kwt:{os.fspath(folder)}", peak
        self.module, self.config = load_keyword_transformer(folder)
        self.module.to(device=device).eval().requires_grad_(False)
        if dtype is not None:
            for part in self.module.children():
                if part is not self.module.frontend:
                    part.to(dtype=dtype)
            self.module.cls.data, self.module.pos.data = (p.to(dtype) for p in (self.module.cls, self.module.pos))
        self.rate: int = self.config["sample_rate"]
        self.samples = self.config["window_samples"] + (self.config["num_frames"] - 1) * self.config["stride_samples"]
        encoder = self.config["encoder_config"]
        self.dim, self.num_layers = encoder["hidden_size"], encoder["num_hidden_layers"]

    def collate(self, items: Sequence[Audio]) -> dict[str, Tensor]:
        """Clips to ``{"samples": (batch, 16000)}``: resampled, scaled to the peak, centred in one second.

        Raises:
            TypeError, ValueError: see :func:`cenote.backbones.waveform.waveforms`.
        """
        clips = waveforms(items, self.rate, None, self.spec)
        return {"samples": torch.from_numpy(np.stack([self._centred(clip) for clip in clips]))}

    def _centred(self, clip: np.ndarray) -> np.ndarray:
        loudest = np.abs(clip).max()
        if self.peak is not None and loudest > 0:
            clip = clip * np.float32(self.peak / loudest)
        excess = (len(clip) - self.samples) // 2
        if excess >= 0:
            return clip[excess : excess + self.samples]
        before = (self.samples - len(clip)) // 2
        return np.pad(clip, (before, self.samples - len(clip) - before))

    def encode(self, batch: dict[str, Tensor], layers: tuple[int, ...], reduce: LayerReducer | None) -> Features:
        samples = batch["samples"].to(device=self.module.pos.device, dtype=torch.float32)
        return collect(
            lambda: (self.module(samples), None), self.module.encoder.layer, layers, reduce, prefix=self.prefix
        )

    def token_strings(self, item: Audio) -> list[str]:
        """``"[CLS]"``, then where each frame starts within the second that the network sees."""
        return ["[CLS]", *times(self.config["num_frames"], self.config["stride_samples"], self.rate)]

    def transform_id(self) -> str:
        return f"keyword-transformer {RESAMPLER} {self.rate} Hz centre {self.samples} peak={self.peak}"

    def fingerprint(self) -> str:
        return weights_digest(self.module, self.config)


def load_keyword_transformer(folder: str | os.PathLike[str]) -> tuple[KeywordTransformer, dict[str, Any]]:
    """The network of a folder, and its settings.

    Raises:
        ValueError: files missing, or not those of a keyword transformer.
    """
    folder = Path(folder).expanduser()
    for name in (WEIGHTS, SETTINGS):
        if not (folder / name).is_file():
            raise ValueError(
                f"a keyword transformer is a folder with {SETTINGS} and {WEIGHTS}; there is no {folder / name}"
            )
    try:
        config = json.loads((folder / SETTINGS).read_text())
        module = KeywordTransformer(config)
        module.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, TypeError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} does not hold a keyword transformer: {reason}") from error
    return module, config
