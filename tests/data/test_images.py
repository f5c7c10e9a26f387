from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft.data.images import ImageFiles

pytestmark = pytest.mark.fast
STORED = Path(__file__).parents[3] / "shared" / "data"


def write(folder: Path, name: str, x: np.ndarray, y: np.ndarray | list[int]) -> Path:
    np.savez_compressed(folder / name, x=x, y=np.asarray(y))
    return folder


def grey(count: int) -> np.ndarray:
    return np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2)


def read(path: Path, **fields):
    return ImageFiles(path=str(path), **fields).read(seed=0)


def test_bytes_become_images_between_0_and_1(tmp_path):
    x = np.array([[[0, 51], [102, 255]], [[255, 0], [0, 0]]], dtype=np.uint8)
    data = read(write(write(tmp_path, "train.npz", x, [0, 2]), "test.npz", x, [1, 0]))
    assert torch.allclose(data.train.inputs[0], torch.tensor([[[0, 0.2], [0.4, 1]]]))
    assert (data.task, data.classes, data.train.labels.tolist()) == ("image", ("0", "1", "2"), [0, 2])


def test_colour_channels_come_first(tmp_path):
    x = np.zeros((2, 4, 5, 3), dtype=np.uint8)
    x[0, 1, 2, 0] = 255
    images = read(write(write(tmp_path, "train.npz", x, [0, 1]), "test.npz", x, [0, 1])).train.inputs
    assert images.shape == (2, 3, 4, 5)
    assert images[0, 0, 1, 2] == images.sum() == 1


def test_a_turn_is_counter_clockwise_and_spares_the_public_images(tmp_path):
    x = np.zeros((10, 2, 2), dtype=np.uint8)
    x[:, 0, 1] = 255  # top right
    data = read(write(write(tmp_path, "train.npz", x, [0, 1] * 5), "test.npz", x, [0, 1] * 5), turn=1, public_share=0.3)
    assert (len(data.train), len(data.public)) == (7, 3)
    assert all(torch.equal(image, torch.tensor([[[1.0, 0], [0, 0]]])) for image in [*data.train.inputs, *data.test.inputs])
    assert all(torch.equal(image, torch.tensor([[[0.0, 1], [0, 0]]])) for image in data.public.inputs)


def test_images_are_resized(tmp_path):
    x = np.full((4, 6, 6), 255, dtype=np.uint8)
    data = read(write(tmp_path, "train.npz", x, [0, 1, 0, 1]), size=3, test_share=0.5)
    assert torch.equal(data.train.inputs, torch.ones(2, 1, 3, 3))
    with pytest.raises(ValueError, match=r"data.size=0"):
        read(tmp_path, size=0)


def test_one_file_has_a_share_held_out_and_a_limit_cuts_both(tmp_path):
    write(tmp_path, "all.npz", grey(20), [0, 1] * 10)
    data = read(tmp_path / "all.npz", test_share=0.4)
    assert (len(data.train), len(data.test)) == (12, 8)
    data = read(tmp_path / "all.npz", test_share=0.4, limit=5, class_names=["a", "b"])
    assert (len(data.train), len(data.test), data.classes) == (5, 5, ("a", "b"))


@pytest.mark.parametrize(
    ("x", "y", "fields", "message"),
    [
        (grey(2).astype(np.float32), [0, 1], {}, r"x is float32 \(2, 2, 2\); needed is uint8"),
        (np.zeros((2, 3, 3, 7), np.uint8), [0, 1], {}, r"x is uint8 \(2, 3, 3, 7\); needed is .* 1 or 3 channels"),
        (grey(2), [0, 1, 2], {}, r"y is int64 \(3,\) for 2 images"),
        (grey(2), [0.0, 1.0], {}, r"y is float64"),
        (grey(2), [0, -1], {}, r"one class index from 0"),
        (grey(2), [3, 3], {}, r"needs at least two classes, it has one: 3"),
        (grey(2), [0, 2], {"class_names": ["a", "b"]}, r"data.class_names has 2 names, .* labels up to 2; give 3 names"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, x, y, fields, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, "train.npz", x, y), **fields)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "train.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"train.npz is not an npz file; write it with numpy.savez_compressed"):
        read(tmp_path)
    np.savez(tmp_path / "train.npz", images=grey(2))
    with pytest.raises(ValueError, match=r"holds the arrays images; needed are x \(images\) and y \(labels\)"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"data.path=FOLDER with train.npz and test.npz"):
        ImageFiles().read(seed=0)


def test_a_test_label_beyond_the_classes_is_refused(tmp_path):
    write(write(tmp_path, "train.npz", grey(2), [0, 1]), "test.npz", grey(2), [0, 2])
    with pytest.raises(ValueError, match=r"test.npz has label 2, the training images have 2 classes"):
        read(tmp_path)


def test_the_stored_fashion_mnist_reads_as_its_readme_says():
    if not (STORED / "fashion_mnist").exists():
        pytest.skip("fashion_mnist is not stored here")
    data = read(STORED / "fashion_mnist", limit=1000)
    assert (data.train.inputs.shape, len(data.classes)) == ((1000, 1, 28, 28), 10)
    assert float(read(STORED / "fashion_mnist").test.inputs.mean()) * 255 == pytest.approx(73.147, abs=1e-2)
