import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from backbones.hosts import save_text
from backbones.speech_hosts import WAVE_HOSTS, WINDOW, noise, save_waveform, save_whisper
from cenote.backbones import load_backbone
from cenote.backbones.waveform import waveforms
from cenote.types import Audio

LENGTHS = (9000, 3000, 6000, 3000)


@pytest.fixture(scope="module", params=WAVE_HOSTS)
def host(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = save_waveform(request.param, folder)
    return request.param, folder, model, load_backbone(f"hf:{folder}")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    return folder, save_whisper(folder), load_backbone(f"hf:{folder}")


def clips():
    return [noise(length, seed) for seed, length in enumerate(LENGTHS)]


def mean(hidden, mask):
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def test_hidden_states_are_those_of_the_network(host):
    name, _, model, backbone = host
    batch = backbone.collate([noise(5000)])
    with torch.inference_mode():
        out = model(batch["input_values"], output_hidden_states=True)
    features = backbone(batch, range(4))
    for number in range(3):
        torch.testing.assert_close(features.hidden[:, number], out.hidden_states[number], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.hidden[:, 3], out.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert features.mask.all()
    assert (features.grid, features.prefix, features.pooled) == (None, 0, None)
    assert (backbone.modality, backbone.dim, backbone.num_layers) == ("audio", 16, 3)
    assert backbone.pads == WAVE_HOSTS[name][2]


def test_a_clip_alone_is_the_clip_in_a_batch(host):
    _, _, _, backbone = host
    together = backbone(backbone.collate(clips()), range(4))
    assert together.mask.sum(1).tolist() == [27, 9, 18, 9]
    for index, clip in enumerate(clips()):
        alone = backbone(backbone.collate([clip]), range(4))
        frames = alone.hidden.shape[2]
        assert together.mask[index].tolist() == [k < frames for k in range(27)]
        torch.testing.assert_close(together.hidden[index, :, :frames], alone.hidden[0], rtol=1e-4, atol=1e-4)


def test_the_networks_that_are_encoded_by_length_would_leak(host):
    """Also with the right mask: this is why they are not padded."""
    name, _, model, backbone = host
    long, short = noise(9000, 0), noise(3000, 1)
    batch = backbone.collate([long, short])
    with torch.inference_mode():
        padded = model(**batch).last_hidden_state[1, :9]
    alone = backbone(backbone.collate([short])).hidden[0, 0]
    difference = float((padded - alone).abs().max())
    assert (difference < 1e-4) == WAVE_HOSTS[name][2], (name, difference)


def test_streaming_gives_the_same_and_sees_the_mask(host):
    _, _, _, backbone = host
    batch = backbone.collate(clips())
    whole = backbone(batch, "all")
    streamed = backbone(batch, "all", reduce=mean)
    expected = torch.stack([mean(whole.hidden[:, i], whole.mask) for i in range(3)], dim=1)
    torch.testing.assert_close(streamed.hidden, expected, rtol=1e-4, atol=1e-5)
    assert streamed.mask.all()


def test_the_network_gets_a_mask_of_samples_and_the_features_one_of_frames(tmp_path):
    """149, 93 and 49 frames. A mask of frames handed to the network, as the official L-TDNN code does, makes it see
    149, 149 and 148."""
    model = save_waveform("wav2vec2", tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    lengths = torch.tensor([48000, 30000, 16000])
    batch = backbone.collate([noise(n, n) for n in lengths.tolist()])
    assert batch["attention_mask"].sum(1).tolist() == lengths.tolist()
    features = backbone(batch, "last", reduce=None)
    assert features.mask.sum(1).tolist() == [149, 93, 49]
    assert model._get_feat_extract_output_lengths(lengths).tolist() == [149, 93, 49]

    def seen(mask):
        return model._get_feature_vector_attention_mask(149, mask).sum(1).tolist()

    assert seen(batch["attention_mask"]) == [149, 93, 49]
    frame_rate = features.mask.long()
    assert seen(frame_rate) == [149, 149, 148]
    with pytest.raises(ValueError, match="which samples are real"):
        backbone({"input_values": batch["input_values"], "attention_mask": frame_rate})


@pytest.mark.parametrize("samples", [1, 100, 399, 400, 401, 719, 720])
def test_short_clips_give_one_frame(tmp_path, samples):
    save_waveform("wav2vec2", tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    frames = 1 if samples < 720 else 2
    together = backbone(backbone.collate([noise(samples), noise(3000)]))
    alone = backbone(backbone.collate([noise(samples)]))
    assert (int(together.mask[0].sum()), alone.hidden.shape[2]) == (frames, frames)
    torch.testing.assert_close(together.hidden[0, :, :frames], alone.hidden[0], rtol=1e-4, atol=1e-4)
    assert len(backbone.token_strings(noise(samples))) == frames


def test_clips_are_normalised_over_real_samples_only(host):
    _, _, _, backbone = host
    batch = backbone.collate(clips())
    for row, clip in enumerate(clips()):
        values = batch["input_values"][row, : len(clip.samples)]
        expected = (clip.samples - clip.samples.mean()) / clip.samples.std()
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)
        assert not batch["input_values"][row, len(clip.samples) :].any()


def test_resampling_max_seconds_and_times(tmp_path):
    save_waveform("wavlm", tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    assert backbone.collate([noise(8000, rate=8000)])["input_values"].shape == (1, 16000)
    seconds = np.arange(16000) / 8000
    tone = np.sin(2 * np.pi * 440 * seconds).astype(np.float32)
    again = backbone.collate([Audio(tone, 8000)])["input_values"][0].numpy()
    expected = np.sqrt(2) * np.sin(2 * np.pi * 440 * np.arange(32000) / 16000)
    np.testing.assert_allclose(again[2000:-2000], expected[2000:-2000], atol=0.01)
    assert backbone.token_strings(noise(1040)) == ["0.00 s", "0.02 s", "0.04 s"]

    short = load_backbone(f"hf:{tmp_path}", max_seconds=0.25)
    batch = short.collate([noise(44100, rate=44100), noise(1000)])
    assert batch["attention_mask"].sum(1).tolist() == [4000, 1000]
    assert len(short.token_strings(noise(16000))) == short(batch).hidden.shape[2] == 12
    assert short.transform_id() != backbone.transform_id()
    assert short.fingerprint() == backbone.fingerprint()
    with pytest.raises(ValueError, match="max_seconds"):
        load_backbone(f"hf:{tmp_path}", max_seconds=0)


def test_fingerprints_and_transforms(tmp_path):
    save_waveform("wavlm", tmp_path / "a")
    save_waveform("wavlm_group", tmp_path / "b")
    a, b = load_backbone(f"hf:{tmp_path / 'a'}"), load_backbone(f"hf:{tmp_path / 'b'}")
    assert a.fingerprint() != b.fingerprint()
    assert a.transform_id() == b.transform_id()
    assert "soxr" in a.transform_id()
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "a")
    assert load_backbone(f"hf:{tmp_path / 'a'}").transform_id() != a.transform_id()


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ("clip.wav", TypeError, "Audio"),
        (Audio(np.zeros(0, np.float32), 16000), ValueError, "one channel"),
        (Audio(np.zeros((2, 500), np.float32), 16000), ValueError, "one channel"),
        (Audio(np.full(500, np.nan, np.float32), 16000), ValueError, "NaN"),
        (Audio(np.zeros(500, np.float32), 0), ValueError, "positive"),
    ],
)
def test_bad_clips(whisper, item, error, message):
    with pytest.raises(error, match=message):
        whisper[2].collate([noise(500), item])


def test_bad_folders(tmp_path):
    save_waveform("hubert", tmp_path)
    with pytest.raises(ValueError, match="causal"):
        load_backbone(f"hf:{tmp_path}", bidirectional=True)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"feature extractor .*preprocessor_config"):
        load_backbone(f"hf:{tmp_path}")
    sew = transformers.SEWConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                                 conv_dim=(8,), conv_kernel=(10,), conv_stride=(5,))  # fmt: skip
    transformers.AutoModel.from_config(sew).save_pretrained(tmp_path / "sew")
    with pytest.raises(ValueError, match=r"SEWModel: a backbone is .*wavlm"):
        load_backbone(f"hf:{tmp_path / 'sew'}")
    save_text("bert", tmp_path / "bert")
    with pytest.raises(ValueError, match="takes no option max_seconds; it takes max_length"):
        load_backbone(f"hf:{tmp_path / 'bert'}", max_seconds=3)


def test_weights_under_their_old_names(tmp_path):
    """Checkpoints on the hub keep the positional convolution's weight norm as weight_g and weight_v."""
    model = save_waveform("wav2vec2", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    new = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    old = {}
    for key, value in state.items():
        for ending, former in new.items():
            key = key.replace(ending, former)
        old[key] = value
    assert old.keys() != state.keys()
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_backbone(f"hf:{tmp_path}").module.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded[key], value)


def test_an_adapter_is_taken_off(tmp_path):
    model = save_waveform("wav2vec2", tmp_path, add_adapter=True, output_hidden_size=16)
    features = load_backbone(f"hf:{tmp_path}")
    batch = features.collate(clips()[:1])
    with torch.inference_mode():
        expected = model.encoder(model.feature_projection(model.feature_extractor(batch["input_values"]).mT)[0])
    torch.testing.assert_close(features(batch).hidden[:, 0], expected.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_whisper_hidden_states(whisper):
    _, model, backbone = whisper
    batch = backbone.collate([noise(8000), noise(4001)])
    with torch.inference_mode():
        out = model.model.encoder(batch["input_features"], output_hidden_states=True)
    features = backbone(batch, range(4))
    for number in range(3):
        torch.testing.assert_close(features.hidden[:, number], out.hidden_states[number], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.hidden[:, 3], out.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert features.hidden.shape[2] == 50 * WINDOW
    assert features.mask.sum(1).tolist() == [25, 13]
    assert (backbone.dim, backbone.num_layers) == (16, 3)
    assert not any("decoder" in name for name, _ in backbone.module.named_parameters())


def test_whisper_is_found_in_every_layout(whisper, tmp_path):
    _, model, backbone = whisper
    for name, part in (("bare", model.model), ("encoder", model.model.encoder)):
        part.save_pretrained(tmp_path / name)
        backbone.extractor.save_pretrained(tmp_path / name)
        assert load_backbone(f"hf:{tmp_path / name}").fingerprint() == backbone.fingerprint()


def test_whisper_alone_streaming_and_times(whisper):
    _, _, backbone = whisper
    batch = backbone.collate(clips())
    together = backbone(batch, "all")
    for index, clip in enumerate(clips()):
        alone = backbone(backbone.collate([clip]), "all")
        assert torch.equal(alone.mask[0], together.mask[index])
        torch.testing.assert_close(alone.hidden[0], together.hidden[index], rtol=1e-4, atol=1e-4)
        assert len(backbone.token_strings(clip)) == int(alone.mask.sum())
    streamed = backbone(batch, "all", reduce=mean)
    expected = torch.stack([mean(together.hidden[:, i], together.mask) for i in range(3)], dim=1)
    torch.testing.assert_close(streamed.hidden, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 320, 321, 7000, 16000])
def test_whisper_frames_cover_the_clip(whisper, samples):
    """What enters the first block, less its position, is one and the same in silence; the frames that differ are those
    of the clip and the one or two after it that see its end through the spectrogram's window and the convolutions."""
    _, _, backbone = whisper
    hidden = backbone(backbone.collate([noise(samples)]), 0)
    content = hidden.hidden[0, 0] - backbone.module.embed_positions.weight
    heard = ((content - content[-5]).abs().amax(1) > 1e-4)[:-2].nonzero().max() + 1
    covered = int(hidden.mask.sum())
    assert covered == -(-samples // 320)
    assert covered <= heard <= covered + 2


def test_whisper_at_its_real_window(tmp_path):
    save_whisper(tmp_path, seconds=30)
    backbone = load_backbone(f"hf:{tmp_path}")
    features = backbone(backbone.collate([noise(16000)]))
    assert features.hidden.shape[2] == 1500
    assert int(features.mask.sum()) == 50


def test_whisper_cuts_at_its_window(whisper):
    folder, _, backbone = whisper
    with pytest.warns(UserWarning, match=r"3\.0 s loses its end"):
        batch = backbone.collate([noise(48000)])
    assert backbone(batch).mask.all()
    torch.testing.assert_close(
        batch["input_features"], backbone.collate([Audio(noise(48000).samples[:32000], 16000)])["input_features"]
    )
    assert len(backbone.token_strings(noise(48000))) == 50 * WINDOW
    short = load_backbone(f"hf:{folder}", max_seconds=1)
    assert int(short(short.collate([noise(48000)])).mask.sum()) == 50
    with pytest.raises(ValueError, match="2 s at most"):
        load_backbone(f"hf:{folder}", max_seconds=3)
    transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=5).save_pretrained(folder)
    with pytest.raises(ValueError, match="window"):
        load_backbone(f"hf:{folder}")


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 192000])
def test_a_handful_of_samples_survives_resampling(rate):
    for samples in (1, 2, 5):
        (found,) = waveforms([noise(samples, rate=rate)], 16000, None, "spec")
        assert 1 <= len(found) <= 2 * samples
        assert np.isfinite(found).all()
