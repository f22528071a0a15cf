"""Judged tasks from the command line to vectors of new inputs."""

import json

import numpy as np
import pandas as pd
import pytest

from backbones.hosts import save_text
from cenote.cli import main
from data.tables import image_folder


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    save_text("bert", folder / "bert")
    generator = np.random.default_rng(0)
    words = ["the", "mat", "on", "ran", "sat", "cat", "dog"]
    rows = [
        {
            "sentence1": " ".join(generator.choice(words, 4)),
            "sentence2": " ".join(generator.choice(words, 4)),
            "score": v,
        }
        for v in generator.random(30)
    ]
    pd.DataFrame(rows).to_csv(folder / "pairs.csv", index=False)
    return folder


def test_similarity_to_vectors(host, tmp_path, capsys):
    out, backbone = tmp_path / "out", f"hf:{host / 'bert'}"
    common = ["--backbone", backbone, "--data", str(host / "pairs.csv"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["probe", *common, "--task", "similarity", "--readouts", "mean,max", "--out", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())
    assert {row["readout"] for row in rows} == {"mean", "max"}
    assert all(set(row["extra"]) == {"pearson"} for row in rows)
    assert "Spearman" in capsys.readouterr().out

    texts = ["the cat sat", "the dog ran on the mat"]
    for suffix in (".npy", ".parquet"):
        target = tmp_path / f"vectors{suffix}"
        assert main(["predict", str(out / "best"), *texts, "--vectors", str(target)]) == 0
        found = np.load(target) if suffix == ".npy" else np.stack(pd.read_parquet(target)["vector"])
        assert found.shape == (2, 16)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert main(["predict", str(out / "best"), *texts]) == 2
    assert "--vectors" in capsys.readouterr().err


def test_verification_of_images_with_a_file_of_trials(tmp_path):
    faces = image_folder(tmp_path / "faces", {"ann": 3, "bob": 3})
    lines = ["ann/0.png,ann/1.png,1", "ann/0.png,bob/1.png,0", "bob/0.png,bob/2.png,1", "ann/2.png,bob/0.png,0"]
    (tmp_path / "trials.csv").write_text("\n".join(lines))
    options = ["--data", str(faces), "--task", "verification", "--readouts", "mean", "--p-target", "0.2"]
    options += ["--trials", str(tmp_path / "trials.csv"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["probe", *options, "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["extra"]["p_target"] == 0.2
    assert len(np.load(tmp_path / "out" / "predictions.npz")["targets"]) == 4


def test_options_of_other_tasks_are_one_line(host, capsys):
    assert main(["probe", "--data", str(host / "pairs.csv"), "--train-on", "x"]) == 2
    assert "--train-on belongs to" in capsys.readouterr().err
    assert main(["probe", "--data", str(host / "pairs.csv"), "--task", "similarity", "--onnx"]) == 2
    assert "--onnx" in capsys.readouterr().err
