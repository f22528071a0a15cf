import numpy as np
import pytest

from cenote.data import load_data


def arrays(count, value=0):
    pixels = np.zeros((count, 3, 5), dtype=np.uint8)
    pixels[:] = np.arange(value, value + count, dtype=np.uint8)[:, None, None]
    return pixels, np.arange(count) % 2


@pytest.mark.parametrize(
    "names", [("train_x", "train_y", "test_x", "test_y"), ("x_train", "y_train", "x_test", "y_test")]
)
def test_archives(names, tmp_path):
    content = dict(zip(names, [*arrays(20), *arrays(6, 100)], strict=True))
    np.savez(tmp_path / "a.npz", **content, class_names=np.array(["shirt", "shoe"]))
    data = load_data(tmp_path / "a.npz")
    assert data.classes == ("shirt", "shoe")
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 6)
    assert [data.test.items[i].getpixel((0, 0)) for i in range(6)] == list(range(100, 106))
    assert data.test.items[0].size == (5, 3)
    assert data.test.targets.tolist() == [0, 1] * 3


def test_bad_archives(tmp_path):
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds no images: .* got other"):
        load_data(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", train_x=np.zeros((3, 2, 2)), train_y=np.zeros(3))
    with pytest.raises(ValueError, match="uint8 images"):
        load_data(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="cannot read"):
        load_data(tmp_path / "c.npz")
