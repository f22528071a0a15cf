"""Minuscule random speech networks of the real classes, saved the way real ones are, and clips for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from backbones.hosts import SHAPE, _randomise
from cenote.types import Audio

WAVE = {
    **SHAPE, "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    "vocab_size": 8,
}  # fmt: skip
LAYER = {**WAVE, "feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
WINDOW = 2
"""Seconds that the tiny Whisper sees."""

WAVE_HOSTS = {
    # name: (configuration class, settings, whether a padded batch is encoded in one go)
    "wav2vec2": ("Wav2Vec2Config", LAYER, True),
    "wav2vec2_post_norm": ("Wav2Vec2Config", {**LAYER, "do_stable_layer_norm": False}, True),
    "wav2vec2_group": ("Wav2Vec2Config", WAVE, False),
    "hubert": ("HubertConfig", LAYER, True),
    "hubert_batch_norm": ("HubertConfig", {**LAYER, "conv_pos_batch_norm": True}, False),
    "hubert_group": ("HubertConfig", WAVE, False),
    "wavlm": ("WavLMConfig", LAYER, True),
    "wavlm_group": ("WavLMConfig", WAVE, False),
    "unispeech": ("UniSpeechConfig", LAYER, True),
    "unispeech_sat": ("UniSpeechSatConfig", LAYER, True),
    "conformer": ("Wav2Vec2ConformerConfig", LAYER, False),
    "data2vec": ("Data2VecAudioConfig", {**WAVE, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}, False),
}


def save_waveform(name: str, folder: Path, **changes: object) -> torch.nn.Module:
    """Save a random network that reads waveforms, with its feature extractor, and return it."""
    kind, settings, _ = WAVE_HOSTS[name]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, kind)(**{**settings, **changes})).eval()
    _randomise(model)
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)
    return model


def save_whisper(folder: Path, seconds: int = WINDOW) -> torch.nn.Module:
    """Save a random Whisper, decoder and all, with its feature extractor, and return it."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=3, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=50, num_mel_bins=20, max_target_positions=8,
        max_source_positions=50 * seconds, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    _randomise(model)
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=seconds).save_pretrained(folder)
    return model


def noise(samples: int, seed: int = 0, rate: int = 16000) -> Audio:
    """Noise that is off centre, so that normalisation matters."""
    return Audio((0.1 + 0.2 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32), rate)
