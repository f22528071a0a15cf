"""Judged tasks from the command line to vectors of new inputs."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from backbones.hosts import save_text
from cenote.backbones import load_backbone
from cenote.cli import main
from cenote.probe import EmbeddingReadout
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


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A readout judged on images, and the folder it was judged on."""
    folder = tmp_path_factory.mktemp("judged-faces")
    images = image_folder(folder / "faces", {"ann": 3, "bob": 3})
    options = ["--data", str(images), "--task", "verification", "--readouts", "mean"]
    options += ["--cache-dir", str(folder / "cache"), "--out", str(folder / "out")]
    assert main(["probe", *options]) == 0
    return images, folder / "out" / "best"


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_an_unreadable_input_is_named_or_left_out_of_the_vectors(faces, tmp_path, suffix, capsys):
    images, best = faces
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    good = sorted(map(str, images.rglob("*.png")))
    given, target = [good[0], str(broken), *good[1:]], tmp_path / f"vectors{suffix}"
    assert main(["predict", str(best), *given, "--vectors", str(target), "--batch-size", "2"]) == 2
    assert "cannot read" in (error := capsys.readouterr().err)
    assert "broken.png" in error
    assert not target.exists()
    assert main(["predict", str(best), *given, "--vectors", str(target), "--on-error", "skip"]) == 0
    error = capsys.readouterr().err
    assert "left out 1 of 7" in error
    assert "broken.png" in error
    if suffix == ".npy":
        found, names = np.load(target), json.loads((tmp_path / "vectors.json").read_text())
    else:
        table = pd.read_parquet(target)
        found, names = np.stack(table["vector"]), table["item"].tolist()
    assert names == good
    assert main(["predict", str(best), good[3], "--vectors", str(tmp_path / "one.npy")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "one.npy")[0], found[3], atol=1e-6)


def test_options_that_vectors_do_not_have_are_refused(faces, tmp_path, capsys):
    images, best = faces
    common = ["predict", str(best), str(images), "--vectors", str(tmp_path / "v.npy")]
    for option in (["--top", "3"], ["--json", "-"], ["--csv", str(tmp_path / "x.csv")]):
        assert main([*common, *option]) == 2
        assert f"{option[0]} is for labels" in capsys.readouterr().err
    assert main([*common, "--documents"]) == 2
    assert "judged by verification" in capsys.readouterr().err


def test_another_backbone_only_where_it_is_allowed(faces, tmp_path, capsys):
    images, best = faces
    copy = tmp_path / "best"
    shutil.copytree(best, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"backbone_fingerprint": "0" * 64}))
    common = ["predict", str(copy), str(images), "--vectors", str(tmp_path / "v.npy")]
    assert main(common) == 2
    assert "--allow-other-backbone" in capsys.readouterr().err
    assert main([*common, "--allow-other-backbone"]) == 0
    assert np.load(tmp_path / "v.npy").shape[0] == 6


def test_documents_get_their_own_prompt(host, tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    pd.DataFrame({"doc_id": ["a", "b"], "text": ["the cat", "the dog ran"]}).to_csv(folder / "corpus.csv", index=False)
    pd.DataFrame({"query_id": ["q"], "text": ["cat"]}).to_csv(folder / "queries.csv", index=False)
    pd.DataFrame({"query_id": ["q"], "doc_id": ["a"], "score": [1]}).to_csv(folder / "qrels.csv", index=False)
    options = ["--backbone", f"hf:{host / 'bert'}", "--data", str(folder), "--task", "retrieval", "--readouts", "mean"]
    options += ["--query-prompt", "on ", "--document-prompt", "mat ", "--cache-dir", str(tmp_path / "cache")]
    assert main(["probe", *options, "--out", str(tmp_path / "out")]) == 0
    vectors = {}
    for name, given in (("query", ["the cat"]), ("document", ["the cat", "--documents"])):
        target = tmp_path / f"{name}.npy"
        assert main(["predict", str(tmp_path / "out" / "best"), *given, "--vectors", str(target)]) == 0
        vectors[name] = np.load(target)
    readout = EmbeddingReadout.from_pretrained(tmp_path / "out" / "best")
    expected = readout.encode(load_backbone(f"hf:{host / 'bert'}"), ["mat the cat"], prompt="").numpy()
    np.testing.assert_allclose(vectors["document"], expected, atol=1e-6)
    assert np.abs(vectors["query"] - expected).max() > 1e-3


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
    assert main(["probe", "--data", "digits", "--limit", "20", "--max-seconds", "3"]) == 2
    assert "backbone 'embedded' takes no option max_seconds" in capsys.readouterr().err


def test_a_limit_below_the_training_classes_still_judges_what_needs_no_training(tmp_path):
    faces = image_folder(tmp_path / "faces", {"ann": 4, "bob": 4})
    other = image_folder(tmp_path / "others", {"cy": 2, "dee": 2, "eve": 2, "flo": 2})
    options = ["--data", str(faces), "--train-on", str(other), "--task", "verification", "--readouts", "mean"]
    options += ["--limit", "4", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert main(["probe", *options]) == 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 1


def test_interrupted_in_training_writes_its_table_and_ends_with_130(tmp_path, monkeypatch, capsys):
    from cenote.probe import train

    calls, scores = [], train.Group.validate

    def interrupting(group, validation):
        calls.append(group)
        if len(calls) == 2:
            raise KeyboardInterrupt
        scores(group, validation)

    faces = image_folder(tmp_path / "faces", {"ann": 4, "bob": 4})
    other = image_folder(tmp_path / "others", {"cy": 6, "dee": 6})
    common = ["--readouts", "mean,simpool", "--epochs", "3", "--cache-dir", str(tmp_path / "cache")]
    judged = ["--data", str(faces), "--train-on", str(other), "--task", "verification"]
    for name, given in (("judged", judged), ("plain", ["--data", "digits", "--limit", "40"])):
        monkeypatch.setattr(train.Group, "validate", interrupting)
        calls.clear()
        assert main(["probe", *given, *common, "--out", str(tmp_path / name)]) == 130
        output = capsys.readouterr()
        assert "simpool *" in output.out
        assert "interrupted" in output.err
        assert json.loads((tmp_path / name / "results.json").read_text())
        monkeypatch.setattr(train.Group, "validate", scores)
        assert main(["probe", *given, *common, "--resume", str(tmp_path / name)]) == 0
        assert "simpool *" not in capsys.readouterr().out


def test_no_further_data_set_is_begun_after_an_interruption(tmp_path, monkeypatch):
    from cenote.probe import train

    def interrupting(group, validation):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Group, "validate", interrupting)
    options = ["--data", "digits", "--data", "digits", "--limit", "40", "--readouts", "mean,simpool", "--epochs", "2"]
    assert main(["probe", *options, "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]) == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0-digits"]
