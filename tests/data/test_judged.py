"""Loading judged data: pairs, BEIR folders, trials, clusters; what is wrong is named."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cenote.data.judged_load import load_judged
from cenote.data.judged_trials import all_trials, cross_trials
from data.tables import encoded, image_folder

FOLDER = Path(os.environ.get("CENOTE_DATA", Path(__file__).parents[3] / "shared" / "data"))


def pairs_table(folder, **columns):
    rows = {
        "sentence1": ["a cat", "a dog", "a cat", "sun", "rain", "snow"],
        "sentence2": ["the cat", "the cat", "a dog", "moon", "sun", "hail"],
        "score": [5.0, 2.5, 1.0, 3, 4, 2],
        "split": ["train", "train", "train", "dev", "test", "test"],
    } | columns
    path = folder / "pairs.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def beir(folder: Path, qrels=None, corpus=None) -> Path:
    documents = corpus or [
        ("d1", "Cats", "purr"),
        ("d2", "", "dogs bark"),
        ("007", "Spies", ""),
        ("d4", "Fish", "swim"),
    ]
    folder.joinpath("qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": i, "title": title, "text": text}) for i, title, text in documents]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    queries = [("q1", "who purrs"), ("q2", "who barks"), ("q3", "who spies"), ("q4", "who swims")]
    (folder / "queries.jsonl").write_text("\n".join(json.dumps({"_id": i, "text": t}) for i, t in queries))
    files = qrels or {
        "train": [("q1", "d1", 1), ("q2", "d2", 2), ("q2", "d1", 0)],
        "test": [("q3", "007", 1), ("q4", "d4", 1)],
    }
    for split, rows in files.items():
        text = "\n".join("\t".join(map(str, row)) for row in [("query-id", "corpus-id", "score"), *rows])
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    return folder


def texts(data, numbers):
    return [data.items[int(i)] for i in numbers]


class TestSimilarity:
    def test_every_text_comes_once_and_parts_are_kept(self, tmp_path):
        data = load_judged(pairs_table(tmp_path), "similarity")
        assert (data.modality, data.task, len(data)) == ("text", "similarity", 8)
        assert len(set(texts(data, range(len(data))))) == len(data)
        assert texts(data, data.train.first) == ["a cat", "a dog", "a cat"]
        assert data.train.value.tolist() == [5.0, 2.5, 1.0]
        assert texts(data, data.test.second) == ["sun", "hail"]
        assert len(data.validation.value) == 1

    def test_named_columns_prompt_and_no_split(self, tmp_path):
        path = pairs_table(tmp_path, extra=list("abcdef"))
        data = load_judged(
            path, "similarity", first_column="extra", split_column="", query_prompt="say: ", score_column="score"
        )
        assert data.train is None
        assert texts(data, data.test.first)[0] == "say: a"
        assert len(data.test.value) == 6

    def test_a_validation_part_is_held_out_where_there_is_none(self, tmp_path):
        path = pairs_table(tmp_path, split=["train"] * 4 + ["test"] * 2)
        first, again = (load_judged(path, "similarity", seed=1) for _ in range(2))
        assert (len(first.train.value), len(first.validation.value)) == (3, 1)
        assert first.validation.first.tolist() == again.validation.first.tolist()

    def test_training_on_another_table(self, tmp_path):
        (tmp_path / "other").mkdir()
        other = pairs_table(tmp_path / "other", split=["train"] * 4 + ["dev"] * 2)
        data = load_judged(pairs_table(tmp_path), "similarity", train_on=other)
        assert (len(data.train.value), len(data.validation.value), len(data.test.value)) == (4, 2, 2)

    @pytest.mark.parametrize(
        ("columns", "match"),
        [
            ({"score": ["5", "much", "1", "3", "4", "2"]}, r"row 1 of .*score 'much' is no number"),
            ({"sentence2": ["the cat", "x", " ", "moon", "sun", "hail"]}, "row 2 .*second text is empty"),
        ],
    )
    def test_bad_rows_are_named_or_left_out(self, tmp_path, columns, match):
        path = pairs_table(tmp_path, **columns)
        with pytest.raises(ValueError, match=match):
            load_judged(path, "similarity")
        data = load_judged(path, "similarity", on_error="skip")
        assert len(data.train.value) == 2
        assert len(data.skipped) == 1

    def test_bad_tables(self, tmp_path):
        with pytest.raises(ValueError, match="unknown split 'holdout'"):
            load_judged(pairs_table(tmp_path, split=["holdout"] * 6), "similarity")
        with pytest.raises(ValueError, match="no test part"):
            load_judged(pairs_table(tmp_path, split=["train"] * 6), "similarity")
        with pytest.raises(ValueError, match=r"all 2 test pairs of .* have the score 2: nothing to rank"):
            load_judged(pairs_table(tmp_path, score=[5, 4, 3, 2, 2, 2]), "similarity")
        with pytest.raises(ValueError, match=r"no column 'sentence'.*did you mean"):
            load_judged(pairs_table(tmp_path), "similarity", first_column="sentence")
        with pytest.raises(ValueError, match="there is no file or folder"):
            load_judged(tmp_path / "nothing.csv", "similarity")


class TestRetrieval:
    def test_a_beir_folder(self, tmp_path):
        data = load_judged(beir(tmp_path / "b"), "retrieval", query_prompt="query: ", validation_fraction=0.5)
        assert texts(data, data.test.documents) == ["Cats purr", "dogs bark", "Spies", "Fish swim"]
        assert texts(data, data.test.queries) == ["query: who spies", "query: who swims"]
        judged = [
            (texts(data, data.test.queries)[q], texts(data, data.test.documents)[d])
            for q, d in zip(data.test.query, data.test.document, strict=True)
        ]
        assert judged == [("query: who spies", "Spies"), ("query: who swims", "Fish swim")]
        # Two training queries, one of them held out; the judgement of grade 0 is gone.
        assert (len(data.train.queries), len(data.validation.queries)) == (1, 1)
        assert len(data.train.grade) == len(data.validation.grade) == 1
        assert {*data.train.grade, *data.validation.grade} == {1.0, 2.0}

    def test_parquet_with_a_split_column(self, tmp_path):
        pd.DataFrame({"doc_id": [1, 2], "title": ["", None], "text": ["x", "y"]}).to_parquet(
            tmp_path / "corpus.parquet"
        )
        pd.DataFrame({"query_id": [1, 2], "text": ["p", "q"]}).to_parquet(tmp_path / "queries.parquet")
        judged = pd.DataFrame({"query_id": [1, 2], "doc_id": [2, 1], "score": [1, 1], "split": ["test", "test"]})
        judged.to_parquet(tmp_path / "qrels.parquet")
        data = load_judged(tmp_path, "retrieval")
        assert data.train is None
        assert data.test.document.tolist() == [1, 0]

    def test_empty_documents_and_missing_ones(self, tmp_path):
        corpus = [("d1", "", "a"), ("d2", "", " "), ("d4", "", "c")]
        folder = beir(tmp_path / "b", {"test": [("q1", "d1", 1), ("q2", "d9", 1), ("q9", "d4", 1)]}, corpus)
        with pytest.raises(ValueError, match=r"document 'd2' .*its text is empty"):
            load_judged(folder, "retrieval")
        data = load_judged(folder, "retrieval", on_error="skip")
        assert [skipped.id for skipped in data.skipped] == ["document 'd2'", "query 'q9'", "document 'd9'"]
        assert len(data.test.queries) == 1
        assert len(data.test.documents) == 2

    def test_a_query_that_is_a_document_is_not_found_as_its_own_answer(self, tmp_path):
        said = {"q1": "who purrs", "q2": "who barks", "q3": "who spies", "q4": "who swims", "x": "x"}
        corpus = [(name, f"title {name}", text) for name, text in said.items()]
        judged = {"train": [("q1", "x", 1), ("q2", "x", 1)], "test": [("q3", "x", 1), ("q4", "q4", 1)]}
        data = load_judged(beir(tmp_path / "b", judged, corpus), "retrieval", validation_fraction=0.5)
        pairs = [
            (texts(data, part.queries[part.excluded[:, 0]]), texts(data, part.documents[part.excluded[:, 1]]))
            for part in (data.train, data.validation, data.test)
        ]
        # q4 is judged relevant to itself.
        assert pairs[2] == (["who spies"], ["title q3 who spies"])
        assert sorted(pairs[:2]) == [
            (["who barks"], ["title q2 who barks"]),
            (["who purrs"], ["title q1 who purrs"]),
        ]
        fewer = data.test.with_documents(np.array([2, 3, 4]))
        assert fewer.excluded.tolist() == [[0, 0]]
        assert (fewer.documents[fewer.document] == data.test.documents[data.test.document]).all()

    def test_documents_that_merely_have_a_query_s_number_are_searched(self, tmp_path):
        corpus = [(name, "", f"something else {name}") for name in ("q1", "q2", "q3", "q4")]
        judged = {"train": [("q1", "q2", 1), ("q2", "q1", 1)], "test": [("q3", "q1", 1), ("q4", "q1", 1)]}
        data = load_judged(beir(tmp_path / "b", judged, corpus), "retrieval", validation_fraction=0.5)
        assert len(data.test.excluded) == 0

    def test_limit_keeps_judged_documents(self, tmp_path):
        data = load_judged(beir(tmp_path / "b"), "retrieval", limit=1, validation_fraction=0.5)
        assert len(data.test.queries) == 1
        assert {texts(data, data.test.documents)[d] for d in data.test.document} <= {"Spies", "Fish swim"}

    @pytest.mark.parametrize(
        ("qrels", "match"),
        [
            ({"test": [("q1", "d1", "yes")]}, "grade 'yes', which is no number"),
            ({"test": [("q1", "d1", 1), ("q1", "d1", 2)]}, "twice and differently"),
            ({"later": [("q1", "d1", 1)]}, "unknown split 'later'"),
            ({"train": [("q1", "d1", 1), ("q2", "d2", 1)]}, "no test part"),
        ],
    )
    def test_bad_judgements(self, tmp_path, qrels, match):
        with pytest.raises(ValueError, match=match):
            load_judged(beir(tmp_path / "b", qrels), "retrieval")

    def test_bad_folders(self, tmp_path):
        with pytest.raises(ValueError, match="no folder"):
            load_judged(tmp_path / "none", "retrieval")
        with pytest.raises(ValueError, match="no table corpus"):
            load_judged(tmp_path, "retrieval")


class TestVerification:
    def speakers(self, folder, splits):
        rows = [
            {"text": f"words {i} of {i % 3}", "speaker_id": 100 + i % 3, "split": split}
            for i, split in enumerate(splits)
        ]
        path = folder / "speakers.csv"
        pd.DataFrame(rows).to_csv(path, index=False)
        return path

    def test_enrolled_against_tested(self, tmp_path):
        data = load_judged(self.speakers(tmp_path, ["enrol"] * 6 + ["test"] * 3), "verification")
        assert len(data.test.value) == 18
        assert data.test.value.sum() == 6
        for first, second, value in zip(data.test.first, data.test.second, data.test.value, strict=True):
            one, other = (data.items[int(i)].split() for i in (first, second))
            assert int(one[1]) < 6 <= int(other[1])
            assert (one[3] == other[3]) == bool(value)

    def test_all_pairs_of_images_and_their_limit(self, tmp_path):
        path = image_folder(tmp_path / "faces", {"ann": 4, "bob": 3, "cy": 2})
        data = load_judged(path, "verification")
        assert (data.modality, len(data.test.value)) == ("image", 36)
        assert data.test.value.sum() == 6 + 3 + 1
        fewer = load_judged(path, "verification", max_pairs=12)
        assert (len(fewer.test.value), fewer.test.value.sum()) == (12, 6)
        assert data.train is None

    def test_own_training_part_and_another_set(self, tmp_path):
        own = load_judged(self.speakers(tmp_path, ["train"] * 9 + ["test"] * 6), "verification")
        assert own.train.names == ("100", "101", "102")
        assert len(own.train.label) + len(own.validation.label) == 9
        assert set(own.train.items) | set(own.validation.items) | set(own.test.first) | set(own.test.second) == set(
            range(15)
        )
        other = image_folder(tmp_path / "train_faces", {"dee": 3, "eve": 3})
        test = image_folder(tmp_path / "faces", {"ann": 2, "bob": 2})
        data = load_judged(test, "verification", train_on=other)
        assert data.train.names == ("dee", "eve")
        assert len(data) == 10
        assert data.items[int(data.train.items[0])].size == (6, 4)

    def test_a_validation_part_of_other_speakers_is_judged_by_trials(self, tmp_path):
        def rows(part, speakers, each):
            return [
                {"text": f"{part} {i} of {who}", "speaker_id": who, "split": part}
                for who in speakers
                for i in range(each)
            ]

        path = tmp_path / "train.csv"
        parts = rows("train", [1, 2, 3], 4) + rows("validation", [3, 7, 8], 3)
        pd.DataFrame(parts).to_csv(path, index=False)
        (tmp_path / "own").mkdir()
        tested = self.speakers(tmp_path / "own", ["test"] * 9)
        data = load_judged(tested, "verification", train_on=path)
        assert not data.chosen_by_labels
        assert data.train.names == ("1", "2", "3")
        assert len(data.train.label) == 12
        assert (len(data.validation.value), data.validation.value.sum()) == (36, 9)
        for first, second, value in zip(
            data.validation.first, data.validation.second, data.validation.value, strict=True
        ):
            one, other = (data.items[int(i)].split() for i in (first, second))
            assert one[0] == other[0] == "validation"
            assert (one[3] == other[3]) == bool(value)
        clusters = load_judged(tested, "clustering", train_on=path, label_column="speaker_id")
        assert not clusters.chosen_by_labels
        assert clusters.validation.names == ("3", "7", "8")
        assert len(clusters.validation.items) == 9
        # Known speakers only: their labels are predicted. No pair of one speaker: a part of the training is held out.
        pd.DataFrame(rows("train", [1, 2, 3], 4) + rows("validation", [1, 3], 2)).to_csv(path, index=False)
        assert load_judged(tested, "verification", train_on=path).chosen_by_labels
        pd.DataFrame(rows("train", [1, 2, 3], 4) + rows("validation", [7, 8], 1)).to_csv(path, index=False)
        data = load_judged(tested, "verification", train_on=path)
        assert data.chosen_by_labels
        assert len(data.train.label) + len(data.validation.label) == 12
        assert "the validation part of" in data.notes[0]

    def test_a_training_part_too_small_to_hold_out_of_is_left_out_with_a_note(self, tmp_path):
        test = image_folder(tmp_path / "faces", {"ann": 6, "bob": 6})
        other = image_folder(tmp_path / "train_faces", {"dee": 2, "eve": 2, "flo": 2, "gil": 2})
        for limit in (3, 4):
            data = load_judged(test, "verification", train_on=other, limit=limit)
            assert (data.train, data.validation) == (None, None)
            assert "is not used: it has too few items a class" in data.notes[0]
            assert len(data.test.value) == limit * (limit - 1) // 2
        data = load_judged(test, "verification", train_on=other, limit=5)
        assert (len(data.train.label), len(data.validation.label), data.notes) == (4, 1, ())
        only = image_folder(tmp_path / "one", {"hal": 4})
        data = load_judged(test, "verification", train_on=only)
        assert data.train is None
        assert "one class only (hal)" in data.notes[0]

    def test_the_label_column_holds_for_the_training_set_where_it_is_there(self, tmp_path):
        frame = pd.DataFrame({"text": [f"t{i}" for i in range(12)], "room": list("ab") * 6, "label": list("xyz") * 4})
        frame.to_csv(tmp_path / "test.csv", index=False)
        frame.assign(text=[f"u{i}" for i in range(12)]).to_csv(tmp_path / "both.csv", index=False)
        frame.drop(columns="room").to_csv(tmp_path / "label.csv", index=False)
        for name, classes in (("both", ("a", "b")), ("label", ("x", "y", "z"))):
            data = load_judged(
                tmp_path / "test.csv", "clustering", label_column="room", train_on=tmp_path / f"{name}.csv"
            )
            assert data.test.names == ("a", "b")
            assert data.train.names == classes

    def test_trials_from_a_file(self, tmp_path):
        faces = image_folder(tmp_path / "faces", {"ann": 2, "bob": 2})
        lines = {
            "a.csv": "first,second,label\nann/0.png,ann/1.png,1\nann/0.png,bob/0.png,0\n",
            "b.txt": "1 ann/0.png ann/1.png\n0 ann/0.png bob/0.png\n",
            "c.tsv": "ann/0.png\tann/1.png\ttarget\nann/0.png\tbob/0.png\tnontarget\n",
        }
        for name, text in lines.items():
            (tmp_path / name).write_text(text)
            data = load_judged(faces, "verification", trials=tmp_path / name)
            assert data.test.value.tolist() == [1.0, 0.0]
            assert [Path(data.ids[int(i)]).parts[-2] for i in data.test.second] == ["ann", "bob"]
        (tmp_path / "bad.csv").write_text("ann/0.png,ann/7.png,1\n")
        with pytest.raises(ValueError, match=r"line 1 .*'ann/7.png', which is no item; did you mean"):
            load_judged(faces, "verification", trials=tmp_path / "bad.csv")
        (tmp_path / "bad.csv").write_text("a,b,c\nann/0.png,ann/1.png,2\n")
        with pytest.raises(ValueError, match=r"line 2 .*label 0 or 1"):
            load_judged(faces, "verification", trials=tmp_path / "bad.csv")

    def test_trials_of_one_kind_only(self, tmp_path):
        faces = image_folder(tmp_path / "faces", {"ann": 3, "bob": 2})
        (tmp_path / "same.csv").write_text("ann/0.png,ann/1.png,1\nann/0.png,ann/2.png,1\n")
        with pytest.raises(ValueError, match=r"same.csv needs trials of both kinds, but all 2 have the label 1"):
            load_judged(faces, "verification", trials=tmp_path / "same.csv")

    def test_trials_of_items_left_out(self, tmp_path):
        faces = image_folder(tmp_path / "faces", {"ann": 3, "bob": 3})
        next(faces.rglob("ann/1.png")).write_bytes(b"no image")
        lines = ["ann/0.png,ann/1.png,1", "ann/0.png,ann/2.png,1", "ann/0.png,bob/0.png,0", "bob/1.png,ann/1.png,0"]
        (tmp_path / "trials.csv").write_text("\n".join(lines))
        data = load_judged(faces, "verification", trials=tmp_path / "trials.csv", on_error="skip")
        assert data.test.value.tolist() == [1.0, 0.0]
        assert len(data) == 5
        assert data.skipped[0].id.endswith("ann/1.png")
        assert data.skipped[1].id == f"2 trials of {tmp_path / 'trials.csv'}"
        # An item that a limit leaves out is no mistake in the file either.
        names = [f"{who}/{number}.png" for who in ("ann", "bob") for number in (0, 2)]
        lines = [f"{a},{b},{int(a[:3] == b[:3])}" for a in names for b in names if a < b]
        (tmp_path / "trials.csv").write_text("\n".join(lines))
        data = load_judged(faces, "verification", trials=tmp_path / "trials.csv", on_error="skip", limit=5)
        assert len(data) == 5 - len(data.skipped)
        assert len(data.test.value) == 3

    @pytest.mark.parametrize("crossed", [False, True])
    def test_pairs_are_drawn_alike_without_listing_them(self, crossed, monkeypatch):
        generator = np.random.default_rng(0)
        items, label = generator.permutation(90)[:70], generator.integers(0, 6, 90)
        enrolled, tested = items[:20], items[20:]

        def trials(most):
            return cross_trials(enrolled, tested, label, most, 0) if crossed else all_trials(items, label, most, 0)

        listed = {frozenset((a, b)) for a, b in zip(trials(10**6).first, trials(10**6).second, strict=True)}
        monkeypatch.setattr("cenote.data.judged_trials.DENSE", 10)
        every, some = trials(10**6), trials(200)
        assert {frozenset((a, b)) for a, b in zip(every.first, every.second, strict=True)} == listed
        assert len(every.value) == len(listed)
        assert (len(some.value), some.value.sum()) == (200, 100)
        assert len({frozenset((a, b)) for a, b in zip(some.first, some.second, strict=True)} & listed) == 200
        for found in (every, some):
            np.testing.assert_array_equal(label[found.first] == label[found.second], found.value == 1)
        if crossed:
            assert set(some.first) <= set(enrolled)

    def test_a_large_set_takes_memory_for_the_pairs_kept_only(self):
        items = np.arange(200_000)
        found = all_trials(items, items // 50, 1000, 0)  # 2e10 pairs
        assert (len(found.value), found.value.sum()) == (1000, 500)
        assert (found.first != found.second).all()

    def test_trained_on_what_is_judged(self, tmp_path):
        faces = image_folder(tmp_path / "faces", {"ann": 3, "bob": 3})
        with pytest.raises(ValueError, match="train_on names the data that is judged"):
            load_judged(faces, "verification", train_on=str(faces) + "/")

    def test_unreadable_items(self, tmp_path):
        rows = [{"image": encoded(i), "label": i % 2} for i in range(6)] + [{"image": b"no image", "label": 1}]
        path = tmp_path / "faces.parquet"
        pd.DataFrame(rows).to_parquet(path)
        with pytest.raises(ValueError, match="row 6"):
            load_judged(path, "verification")
        data = load_judged(path, "verification", on_error="skip")
        assert [skipped.id for skipped in data.skipped] == ["row 6"]
        assert len(data) == 6


class TestClustering:
    def test_everything_is_clustered_where_there_are_no_parts(self, tmp_path):
        path = tmp_path / "topics.csv"
        pd.DataFrame({"text": [f"t{i}" for i in range(9)], "label": list("abc") * 3}).to_csv(path, index=False)
        data = load_judged(path, "clustering", query_prompt="topic: ")
        assert data.train is None
        assert data.test.names == ("a", "b", "c")
        assert data.items[0] == "topic: t0"
        assert load_judged(path, "clustering").fingerprint != data.fingerprint

    def test_parts(self, tmp_path):
        path = tmp_path / "topics.csv"
        rows = {"text": [f"t{i}" for i in range(30)], "label": list("abc") * 10, "split": ["train"] * 24 + ["test"] * 6}
        pd.DataFrame(rows).to_csv(path, index=False)
        data = load_judged(path, "clustering")
        assert (len(data.train.label), len(data.validation.label), len(data.test.label)) == (19, 5, 6)
        assert [data.train.names[i] for i in data.train.label] == [
            rows["label"][int(data.items[int(i)][1:])] for i in data.train.items
        ]


def test_options_of_other_tasks_are_refused(tmp_path):
    path = pairs_table(tmp_path)
    for options, match in (
        ({"task": "ranking"}, "task must be one of"),
        ({"task": "similarity", "trials": path}, "trials belong to verification"),
        ({"task": "similarity", "document_prompt": "x"}, "document_prompt belongs to retrieval"),
        ({"task": "similarity", "limit": 0}, "limit must be at least 1"),
        ({"task": "similarity", "on_error": "ignore"}, "on_error must be"),
    ):
        with pytest.raises(ValueError, match=match):
            load_judged(path, **options)
    faces = image_folder(tmp_path / "faces", {"ann": 2, "bob": 2})
    with pytest.raises(ValueError, match="prompts are for texts"):
        load_judged(faces, "clustering", query_prompt="x")


SIZES = {
    "scifact": ("retrieval", 6288, 300, 5183),
    "cranfield": ("retrieval", 1623, 75, 1398),
    "stsb_subset/stsb_subset.parquet": ("similarity", 7509, 625, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_larger_sets(name):
    if not (FOLDER / name).exists():
        pytest.skip(f"{FOLDER / name} is not at hand (CENOTE_DATA names the folder)")
    task, items, units, documents = SIZES[name]
    data = load_judged(FOLDER / name, task, on_error="skip")
    assert len(data) == items
    assert len(data.test.queries if task == "retrieval" else data.test.value) == units
    if documents:
        assert len(data.test.documents) == documents
    assert len(np.unique(data.ids)) == len(data)
