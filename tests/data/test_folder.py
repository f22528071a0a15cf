import os

import pytest

from cenote.data import load_data
from data.tables import image_folder, picture, truncate


def test_class_folders(tmp_path):
    image_folder(tmp_path, {"cat": 10, "dog": 20})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_text("no image")
    data = load_data(tmp_path)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.validation), len(data.test)) == (22, 2, 6)
    assert data.test.targets.bincount().tolist() == [2, 4]
    for split in (data.train, data.validation, data.test):
        for i, name in enumerate(split.ids):
            kind, file = name.split("/")
            assert data.classes[split.targets[i]] == kind
            assert split.items[i].getpixel((0, 0))[0] == int(file.removesuffix(".png"))


def test_given_splits_are_kept_and_missing_ones_made(tmp_path):
    image_folder(tmp_path / "train", {"cat": 8, "dog": 8})
    image_folder(tmp_path / "val", {"cat": 2, "dog": 1})
    data = load_data(str(tmp_path))
    assert sorted(data.validation.ids) == ["val/cat/0.png", "val/cat/1.png", "val/dog/0.png"]
    assert (len(data.train), len(data.test)) == (13, 3)
    image_folder(tmp_path / "test", {"cat": 1, "dog": 1})
    data = load_data(str(tmp_path))
    assert sorted(data.test.ids) == ["test/cat/0.png", "test/dog/0.png"]
    assert len(data.train) == 16


def test_a_class_may_be_called_test(tmp_path):
    data = load_data(image_folder(tmp_path, {"test": 5, "control": 5}))
    assert data.classes == ("control", "test")


def test_nested_files_belong_to_the_outer_class(tmp_path):
    image_folder(tmp_path, {"cat/indoors": 4, "cat/outdoors": 4, "dog": 4})
    assert load_data(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize("damage", ["garbage", "truncated"])
def test_unreadable_images(tmp_path, damage):
    image_folder(tmp_path, {"cat": 10, "dog": 10})
    bad = tmp_path / "dog" / "3.png"
    if damage == "garbage":
        bad.write_bytes(b"not an image at all")
    else:
        truncate(bad)
    data = load_data(tmp_path, on_error="skip")
    assert [(s.id, s.split) for s in data.skipped] == [("dog/3.png", data.skipped[0].split)]
    assert "readable image" in data.skipped[0].reason
    kept = [*data.train.ids, *data.validation.ids, *data.test.ids]
    assert len(kept) == 19
    assert "dog/3.png" not in kept

    def read_all():
        whole = load_data(tmp_path)  # garbage is seen here,
        for split in (whole.train, whole.validation, whole.test):
            for i in range(len(split)):
                split.items[i]  # missing pixels here

    with pytest.raises(ValueError, match=r"cannot read dog/3\.png"):
        read_all()


def test_items_are_decoded_only_when_asked_for(tmp_path, monkeypatch):
    from PIL import ImageFile

    image_folder(tmp_path, {"cat": 10, "dog": 10})
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(1) or load(self))
    data = load_data(tmp_path)
    assert decoded == []
    data.train.items[0]
    assert decoded


def test_orientation_of_the_camera_is_undone(tmp_path):
    image_folder(tmp_path, {"cat": 3, "dog": 3})
    for kind in ("cat", "dog"):
        for i in range(3):
            image = picture(i, (6, 4))
            exif = image.getexif()
            exif[274] = 6  # turned by a quarter
            image.save(tmp_path / kind / f"{i}.png", exif=exif)
    assert load_data(tmp_path).train.items[0].size == (4, 6)


def test_fingerprints(tmp_path):
    image_folder(tmp_path, {"cat": 10, "dog": 10})
    first, again, other = load_data(tmp_path), load_data(tmp_path), load_data(tmp_path, seed=1)
    assert first.train.fingerprint == again.train.fingerprint
    assert first.train.ids == again.train.ids
    assert len({first.train.fingerprint, first.test.fingerprint, other.train.fingerprint}) == 3
    os.utime(tmp_path / "cat" / "0.png", (1, 1))
    assert load_data(tmp_path).train.fingerprint != first.train.fingerprint


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        load_data(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load_data(tmp_path)
    image_folder(tmp_path / "one", {"cat": 10})
    with pytest.raises(ValueError, match=r"one class only \(cat\)"):
        load_data(tmp_path / "one")
    picture(0).save(tmp_path / "one" / "loose.png")
    with pytest.raises(ValueError, match=r"loose.png is in no class folder"):
        load_data(tmp_path / "one")
    image_folder(tmp_path / "parts" / "train", {"cat": 5, "dog": 5})
    image_folder(tmp_path / "parts" / "test", {"cat": 2, "bird": 2})
    with pytest.raises(ValueError, match=r"labels of the test part .* never occur in its training part: bird"):
        load_data(tmp_path / "parts")
    image_folder(tmp_path / "parts" / "extra", {"cat": 2})
    with pytest.raises(ValueError, match="unknown split 'extra'"):
        load_data(tmp_path / "parts")
    with pytest.raises(ValueError, match="no table"):
        load_data(tmp_path / "one", label_column="label")
    with pytest.raises(ValueError, match=r"did you mean '.*parts'"):
        load_data(str(tmp_path / "partz"))
