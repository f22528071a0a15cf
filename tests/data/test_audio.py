import re

import datasets
import numpy as np
import pandas as pd
import pytest
import soundfile

from cenote.data import load_data
from cenote.data.audio import read_sound
from cenote.data.items import Unreadable
from cenote.probe.inputs import read_inputs
from cenote.types import Audio
from data.sounds import RATE, encoded, sound_folder, tone, value_of
from data.tables import image_folder


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """The datasets library keeps converted tables in a cache; let it be one of the tests' own."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


def check_numbers(data, count):
    """Each item carries its own number, and labels alternate."""
    found = []
    for split in (data.train, data.validation, data.test):
        for i in range(len(split)):
            clip = split.items[i]
            assert isinstance(clip, Audio)
            assert (clip.samples.dtype, clip.samples.ndim, clip.rate) == (np.float32, 1, RATE)
            number = value_of(clip)
            assert split.ids[i] == f"row {number}"
            assert split.targets[i] == number % 2
            found.append(number)
    assert sorted(found) == list(range(count))


def test_class_folders(tmp_path):
    sound_folder(tmp_path, {"no": 10, "yes": 20})
    (tmp_path / "yes" / "notes.txt").write_text("no sound")
    (tmp_path / "yes" / ".hidden.wav").write_text("no sound")
    data = load_data(tmp_path)
    assert (data.modality, data.classes) == ("audio", ("no", "yes"))
    assert (len(data.train), len(data.validation), len(data.test)) == (22, 2, 6)
    for split in (data.train, data.validation, data.test):
        for i, name in enumerate(split.ids):
            kind, file = name.split("/")
            assert data.classes[split.targets[i]] == kind
            assert value_of(split.items[i]) == int(file.removesuffix(".wav"))


def test_split_folders(tmp_path):
    for part, count in (("train", 8), ("dev", 2), ("test", 3)):
        sound_folder(tmp_path / part, {"no": count, "yes": count}, "flac")
    data = load_data(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 4, 6)
    assert data.test.ids[0] == "test/no/0.flac"


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "aiff", "au"])
def test_formats(tmp_path, ending):
    path = tmp_path / f"clip.{ending}"
    wave = (0.5 * np.sin(np.arange(16000) / 20)).astype(np.float32)
    soundfile.write(path, wave, 16000)
    clip = read_sound(path)
    assert clip.rate == 16000
    assert len(clip.samples) == 16000
    lossless = ending not in ("ogg", "mp3")
    np.testing.assert_allclose(clip.samples[500:-500], wave[500:-500], atol=1e-4 if lossless else 0.05)


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([tone(100), tone(300), tone(500)], axis=1), RATE)
    assert value_of(read_sound(tmp_path / "a.wav")) == 300
    both = read_sound({"array": np.stack([tone(100), tone(300)]), "sampling_rate": RATE})
    assert (len(both.samples), value_of(both)) == (400, 200)


def test_images_and_sounds_do_not_mix(tmp_path):
    sound_folder(tmp_path / "one", {"no": 3, "yes": 3})
    image_folder(tmp_path / "one" / "more", {"cat": 2})
    with pytest.raises(ValueError, match=r"both images \(0\.png, \.\.\.\) and sounds \(0\.wav"):
        load_data(tmp_path / "one")
    (tmp_path / "empty" / "no").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no images and no sounds"):
        load_data(tmp_path / "empty")
    sound_folder(tmp_path / "loose", {"no": 3, "yes": 3})
    soundfile.write(tmp_path / "loose" / "a.wav", tone(1), RATE)
    with pytest.raises(ValueError, match=r"a\.wav is in no class folder: expected CLASS/FILE"):
        load_data(tmp_path / "loose")


@pytest.mark.parametrize("column", ["audio", "Speech", "wav", "clip", "take"])
@pytest.mark.parametrize("cell", ["bytes", "struct"])
def test_encoded_bytes_in_a_table(tmp_path, column, cell):
    clips = [encoded(i, "FLAC") for i in range(40)]
    cells = clips if cell == "bytes" else [{"bytes": c, "path": None} for c in clips]
    pd.DataFrame({column: cells, "text": ["a b"] * 40, "label": [i % 2 for i in range(40)]}).to_parquet(
        tmp_path / "a.parquet"
    )
    data = load_data(tmp_path / "a.parquet", **({"audio_column": "take"} if column == "take" else {}))
    assert data.modality == "audio"
    check_numbers(data, 40)


@pytest.mark.parametrize(("column", "kind"), [("audio_path", "csv"), ("file_name", "csv"), ("audio", "jsonl")])
def test_paths_in_a_table(tmp_path, column, kind):
    sound_folder(tmp_path, {"all": 20})
    table = pd.DataFrame({column: [f"all/{i}.wav" for i in range(20)], "label": [i % 2 for i in range(20)]})
    if kind == "csv":
        table.to_csv(tmp_path / "a.csv", index=False)
    else:
        table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    check_numbers(load_data(tmp_path / f"a.{kind}"), 20)


def test_arrays_in_a_table(tmp_path):
    cells = [{"array": tone(i).astype(np.float64).tolist(), "path": None, "sampling_rate": RATE} for i in range(20)]
    pd.DataFrame({"audio": cells, "label": [i % 2 for i in range(20)]}).to_parquet(tmp_path / "a.parquet")
    check_numbers(load_data(tmp_path / "a.parquet"), 20)


def test_declared_audio_as_the_datasets_library_keeps_it(tmp_path):
    """A column of type Audio is found by its type, and is not decoded by the library, which would need torchcodec."""
    rows = {
        "what": [{"bytes": encoded(i), "path": f"{i}.wav"} for i in range(20)],
        "text": ["a b"] * 20,
        "label": [i % 2 for i in range(20)],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("what", datasets.Audio(sampling_rate=RATE))
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "a.parquet")
    check_numbers(load_data(tmp_path / "saved"), 20)
    check_numbers(load_data(tmp_path / "a.parquet"), 20)


def test_a_folder_with_metadata(tmp_path):
    sound_folder(tmp_path / "train", {"all": 20})
    table = pd.DataFrame({"file_name": [f"all/{i}.wav" for i in range(20)], "label": [i % 2 for i in range(20)]})
    table.to_csv(tmp_path / "train" / "metadata.csv", index=False)
    check_numbers(load_data(tmp_path / "train"), 20)


def test_columns_asked_for(tmp_path):
    pd.DataFrame({"image": [encoded(0)] * 20, "other": [encoded(0)] * 20, "label": [0, 1] * 10}).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match=r"not both \(image_column='image', audio_column='other'\)"):
        load_data(tmp_path / "a.parquet", image_column="image", audio_column="other")
    with pytest.raises(ValueError, match=r"no column 'othr'.*did you mean 'other'"):
        load_data(tmp_path / "a.parquet", audio_column="othr")
    assert load_data(tmp_path / "a.parquet", audio_column="other").modality == "audio"
    with pytest.raises(ValueError, match="no table"):
        load_data(sound_folder(tmp_path / "f", {"no": 3, "yes": 3}), audio_column="audio")


def damaged(kind, path):
    """Write a clip that cannot be used, and say what the reason must tell."""
    if kind == "empty":
        path.write_bytes(b"")
        return "the file is empty"
    if kind == "garbage":
        path.write_bytes(b"not a sound at all")
        return "not a readable sound"
    if kind == "no samples":
        soundfile.write(path, tone(0, 0), RATE)
        return "no samples"
    if kind == "nan":
        wave = tone(1)
        wave[7] = np.nan
        soundfile.write(path, wave, RATE, subtype="FLOAT")
        return "1 samples are NaN or infinite"
    noise = np.random.default_rng(0).uniform(-1, 1, 40000)
    soundfile.write(path, noise, RATE, format="FLAC")
    path.write_bytes(path.read_bytes()[:30000])
    return "not a readable sound|ends after"


@pytest.mark.parametrize("kind", ["empty", "garbage", "no samples", "nan", "truncated"])
def test_unreadable_clips(tmp_path, kind):
    sound_folder(tmp_path, {"no": 10, "yes": 10})
    reason = damaged(kind, tmp_path / "yes" / "3.wav")
    data = load_data(tmp_path, on_error="skip")
    assert [s.id for s in data.skipped] == ["yes/3.wav"]
    assert re.search(reason, data.skipped[0].reason)
    kept = [*data.train.ids, *data.validation.ids, *data.test.ids]
    assert len(kept) == 19
    assert "yes/3.wav" not in kept

    def read_all():
        whole = load_data(tmp_path)  # a wrong head is seen here,
        for split in (whole.train, whole.validation, whole.test):
            for i in range(len(split)):
                split.items[i]  # wrong samples here

    with pytest.raises(ValueError, match=rf"cannot read yes/3\.wav .*({reason})"):
        read_all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no clip"),
        ({"bytes": None, "path": None}, "no clip"),
        ("nowhere.wav", r"no file '.*nowhere\.wav'"),
        (3.5, "not a clip but a float"),
        ({"array": tone(1), "sampling_rate": None}, "without a sampling_rate"),
        ({"array": [], "sampling_rate": RATE}, "no samples"),
        ({"array": [1, 2], "sampling_rate": RATE}, "floats between -1 and 1, got int64"),
        ({"array": [[0.1], [0.1, 0.2]], "sampling_rate": RATE}, "different lengths"),
        ({"array": [float("nan")], "sampling_rate": RATE}, "NaN"),
    ],
)
def test_unreadable_cells(tmp_path, content, reason):
    with pytest.raises(Unreadable, match=reason):
        read_sound(content, tmp_path)


def test_bad_cells_of_a_table_are_named_and_skipped(tmp_path):
    cells = [{"bytes": encoded(i), "path": None} for i in range(20)]
    cells[4], cells[9] = None, {"bytes": None, "path": "gone.wav"}
    pd.DataFrame({"audio": cells, "label": [i % 2 for i in range(20)]}).to_parquet(tmp_path / "a.parquet")
    data = load_data(tmp_path / "a.parquet", on_error="skip")
    assert {s.id: s.reason.split(" '")[0] for s in data.skipped} == {
        "row 4": "there is no clip",
        "row 9": "there is no file",
    }
    with pytest.raises(ValueError, match=r"cannot read row [49] of"):
        load_data(tmp_path / "a.parquet")


def test_only_heads_are_read_until_asked(tmp_path, monkeypatch):
    sound_folder(tmp_path, {"no": 10, "yes": 10})
    read = []
    original = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, *a, **k: read.append(1) or original(self, *a, **k))
    data = load_data(tmp_path)
    assert read == []
    data.train.items[0]
    assert read == [1]


def test_inputs_of_the_command_line(tmp_path):
    sound_folder(tmp_path / "some", {"no": 2, "yes": 1})
    items, names = read_inputs([str(tmp_path / "some"), str(tmp_path / "some" / "no" / "1.wav")], "audio")
    assert [name.split("some/")[1] for name in names] == ["no/0.wav", "no/1.wav", "yes/0.wav", "no/1.wav"]
    assert [value_of(items[i]) for i in range(4)] == [0, 1, 0, 1]
    (tmp_path / "empty").mkdir()
    for given, message in (("empty", "no sounds in"), ("absent.wav", "no such audio file or folder")):
        with pytest.raises(ValueError, match=message):
            read_inputs([str(tmp_path / given)], "audio")
