import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.signal import resample_poly

from backbones.speech_hosts import noise
from cenote.backbones import load_backbone
from cenote.backbones.keyword_transformer import KeywordTransformer
from cenote.data.audio import read_sound
from cenote.types import Audio

DATA = Path(os.environ.get("CENOTE_DATA", Path(__file__).parents[3] / "shared" / "data"))
TINY = {
    "encoder_config": {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 16,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "num_tokens": 99, "num_frames": 98, "num_mfcc": 10, "num_labels": 3, "sample_rate": 16000, "window_samples": 480,
    "stride_samples": 160, "log_floor": 1e-12, "n_fft": 512, "fft_bins": 244,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kwt")
    (folder / "config.json").write_text(json.dumps(TINY))
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(value.shape, generator=generator) if name.startswith("frontend")
        else 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in KeywordTransformer(TINY).state_dict().items()
    }  # fmt: skip
    save_file(state, folder / "model.safetensors")
    return folder, state, load_backbone(f"kwt:{folder}")


def reference(state, samples):
    """The forward pass in float64, frame by frame."""
    w = {name: value.double().numpy() for name, value in state.items()}
    rows = []
    for start in range(0, 16000 - 480 + 1, 160):
        magnitude = np.abs(np.fft.rfft(samples[start : start + 480] * w["frontend.window"], 512))[:244]
        rows.append(np.log(np.maximum(magnitude @ w["frontend.mel"].T, 1e-12)) @ w["frontend.dct"].T)
    x = np.concatenate([w["cls"][0], np.stack(rows) @ w["patch.weight"].T + w["patch.bias"]]) + w["pos"][0]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    states = [x]
    for number in range(2):
        layer = f"encoder.layer.{number}"
        q, k, v = (linear(f"{layer}.attention.self.{part}", x) for part in ("query", "key", "value"))
        scores = q @ k.T / np.sqrt(8)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        x = norm(f"{layer}.attention.output.LayerNorm", x + linear(f"{layer}.attention.output.dense", mixed))
        h = linear(f"{layer}.intermediate.dense", x)
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", h))
        states.append(x)
    return np.stack(states)


def test_hidden_states(tiny):
    _, state, backbone = tiny
    clip = noise(16000)
    batch = backbone.collate([clip, noise(16000, 1)])
    np.testing.assert_allclose(batch["samples"][0], clip.samples * 0.5 / np.abs(clip.samples).max(), rtol=1e-5)
    features = backbone(batch, (0, 1, 2))
    np.testing.assert_allclose(features.hidden[0], reference(state, batch["samples"][0].numpy()), rtol=1e-3, atol=1e-3)
    assert features.mask.all()
    assert (features.prefix, backbone.dim, backbone.num_layers, backbone.modality) == (1, 8, 2, "audio")
    assert len(backbone.token_strings(clip)) == features.hidden.shape[2] == 99
    assert backbone.token_strings(clip)[:3] == ["[CLS]", "0.00 s", "0.01 s"]


def test_one_second_from_the_middle(tiny):
    folder, _, _ = tiny
    backbone = load_backbone(f"kwt:{folder}", peak=None)
    ramp = np.arange(1, 20002, dtype=np.float32)
    short, long = backbone.collate([Audio(ramp[:1001], 16000), Audio(ramp, 16000)])["samples"].numpy()
    assert np.flatnonzero(short)[[0, -1]].tolist() == [7499, 8499]
    assert (long[0], long[-1]) == (2001, 18000)
    assert backbone.collate([Audio(ramp[:8000], 8000)])["samples"].shape == (1, 16000)
    silent = load_backbone(f"kwt:{folder}").collate([Audio(np.zeros(10, np.float32), 16000)])
    assert not silent["samples"].any()


def test_streaming_dtype_and_identity(tiny):
    folder, _, backbone = tiny
    batch = backbone.collate([noise(9000), noise(20000, 1)])
    streamed = backbone(batch, "all", reduce=lambda hidden, mask: hidden.mean(1, keepdim=True))
    torch.testing.assert_close(streamed.hidden, backbone(batch, "all").hidden.mean(2, keepdim=True))
    half = load_backbone(f"kwt:{folder}", dtype="bfloat16")
    torch.testing.assert_close(half(batch).hidden.float(), backbone(batch).hidden, rtol=0.2, atol=0.3)
    quiet = load_backbone(f"kwt:{folder}", peak=None)
    assert quiet.transform_id() != backbone.transform_id()
    assert quiet.fingerprint() == backbone.fingerprint()


def test_bad_folders(tiny, tmp_path):
    folder, state, _ = tiny
    with pytest.raises(ValueError, match=r"there is no .*model\.safetensors"):
        load_backbone(f"kwt:{tmp_path}")
    with pytest.raises(ValueError, match="peak"):
        load_backbone(f"kwt:{folder}", peak=2)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    save_file({k: v for k, v in state.items() if k != "cls"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold a keyword transformer"):
        load_backbone(f"kwt:{tmp_path}")


def test_published_floors_on_spoken_digits():
    """Class token 0.878 and mean 0.794 with the test speaker left out; the resampler of those figures, which leaves
    something in the upper bands, is part of them."""
    folder, table = DATA / "models" / "kwt1_speech_commands", DATA / "fsdd" / "fsdd_8khz.parquet"
    if not folder.is_dir() or not table.is_file():
        pytest.skip(f"{folder} and {table} are not at hand (CENOTE_DATA names the folder)")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    backbone = load_backbone(f"kwt:{folder}")
    assert len(load_file(folder / "model.safetensors")) == len(backbone.module.state_dict())
    digits = pd.read_parquet(table)
    clips = [Audio(resample_poly(read_sound(c).samples, 2, 1).astype(np.float32), 16000) for c in digits.audio]
    hidden = torch.cat([backbone(backbone.collate(clips[i : i + 100])).hidden[:, 0] for i in range(0, 1200, 100)])
    speakers, labels = digits.speaker.to_numpy(), digits.digit.to_numpy()
    for vectors, published in ((hidden[:, 0].numpy(), 0.878), (hidden.mean(1).numpy(), 0.794)):
        scores = []
        for speaker in np.unique(speakers):
            test = speakers == speaker
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
            scores.append(model.fit(vectors[~test], labels[~test]).score(vectors[test], labels[test]))
        assert np.mean(scores) == pytest.approx(published, abs=0.01)
