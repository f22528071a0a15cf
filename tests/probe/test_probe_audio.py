"""The main job on clips of different lengths, with a tiny WavLM of random weights and a folder of sounds."""

import json

import numpy as np
import pytest
import soundfile

from backbones.speech_hosts import save_waveform
from cenote.backbones import load_backbone
from cenote.cli import main
from cenote.probe import Readout, probe
from cenote.probe.export_onnx import export_onnx

READOUTS = "mean,attentive_statistics,weighted_layers > mean"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Low and high tones in noise, 0.1 to 0.3 s long, one clip of them cut off."""
    folder = tmp_path_factory.mktemp("audio")
    save_waveform("wavlm", folder / "wavlm")
    generator = np.random.default_rng(0)
    for kind, frequency in (("high", 3000), ("low", 300)):
        (folder / "clips" / kind).mkdir(parents=True)
        for number in range(40):
            time = np.arange(generator.integers(1600, 4800)) / 16000
            wave = 0.3 * np.sin(2 * np.pi * frequency * time) + 0.03 * generator.standard_normal(len(time))
            soundfile.write(folder / "clips" / kind / f"{number}.wav", wave, 16000)
    (folder / "clips" / "low" / "7.wav").write_bytes(b"RIFF")
    result = probe(
        f"hf:{folder / 'wavlm'}",
        str(folder / "clips"),
        READOUTS,
        layers="last",
        seeds=1,
        epochs=6,
        out=folder / "out",
        cache_dir=str(folder / "cache"),
        backbone_options={"max_seconds": 0.2},
        data_options={"on_error": "skip"},
    )
    return result, folder


def test_every_readout_has_a_row_and_the_pitch_is_found(run):
    result, folder = run
    rows = {row.readout: row for row in result.rows}
    assert set(rows) == set(READOUTS.split(","))
    assert rows["weighted_layers > mean"].layers == "1,2,3"
    assert rows["mean"].tokens == "both"
    assert rows["mean"].score > 0.9
    assert result.notes == ("1 items could not be read and were left out",)
    assert json.loads((folder / "out" / "results.json").read_text())[0]["readout"] == result.rows[0].readout


def test_the_report_names_the_times_of_the_frames(run):
    result, folder = run
    assert result.gallery_items[0][:2] == ["0.00 s", "0.02 s"]
    assert len({len(item) for item in result.gallery_items}) > 1
    page = (folder / "out" / "report.html").read_text()
    assert "0.02 s" in page
    assert "attentive_statistics" in page


def test_the_best_readout_predicts_new_clips(run, capsys):
    _, folder = run
    best = folder / "out" / "best"
    assert Readout.from_pretrained(best).config.backbone_options == {"max_seconds": 0.2}
    assert main(["predict", str(best), str(folder / "clips" / "high" / "3.wav"), "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["label_1"] == "high"
    everything = [str(folder / "clips"), "--on-error", "skip", "--json", "-"]
    assert main(["predict", str(best), *everything]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert len(rows) == 79
    assert np.mean([row["label_1"] in row["item"] for row in rows]) > 0.9
    assert "7.wav" in captured.err
    assert main(["predict", str(best), str(folder / "clips")]) == 2
    assert "7.wav: not a readable sound" in capsys.readouterr().err


def test_the_command_line_reads_a_named_column(run, tmp_path, capsys):
    _, folder = run
    table = "file,take,goal\n" + "".join(
        f"{folder}/clips/{kind}/{number}.wav,{number},{kind}\n" for kind in ("low", "high") for number in range(8, 28)
    )
    (tmp_path / "a.csv").write_text(table)
    options = ["--backbone", f"hf:{folder / 'wavlm'}", "--readouts", "mean", "--out", str(tmp_path / "out"),
               "--cache-dir", str(tmp_path / "cache"), "--label-column", "goal", "--max-seconds", "0.1"]  # fmt: skip
    assert main(["probe", "--data", str(tmp_path / "a.csv"), "--audio-column", "file", *options]) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["backbone_options"] == {"max_seconds": 0.1}
    assert main(["probe", "--data", str(tmp_path / "a.csv"), "--audio-column", "fiel", *options]) == 2
    assert "did you mean 'file'" in capsys.readouterr().err


def test_sounds_are_not_exported_to_onnx(run, tmp_path):
    _, folder = run
    backbone = load_backbone(f"hf:{folder / 'wavlm'}", max_seconds=0.2)
    with pytest.raises(ValueError, match="image and text backbones"):
        export_onnx(Readout.from_pretrained(folder / "out" / "best"), backbone, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="holds audio"):
        probe("embedded", str(folder / "clips"), data_options={"on_error": "skip"})
