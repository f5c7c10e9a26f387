"""Images from local npz files."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fedpeft.data.folder import find
from fedpeft.data.table import Dataset, Table, held_out, limited


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """A folder with train.npz and test.npz (arrays `x` uint8 (N, H, W) or (N, H, W, C), `y` integers (N,)); or one npz."""

    path: str | None = None  # the folder, or the file
    size: int | None = None  # pixels of a side to resize to
    turn: int = 0  # quarter turns of train and test, counter-clockwise; public images stay upright
    limit: int | None = None  # images kept of train and of test each, for trials
    public_share: float = 0.0  # of the training images, set aside as public
    test_share: float = 0.2  # of the images, held out if there is no test.npz
    class_names: Sequence[str] | None = None  # null: the numbers from 0 to the largest label

    def read(self, seed: int) -> Dataset:
        """Images (N, C, H, W) in [0, 1]."""
        train_file, test_file = find(self.path, (".npz",))
        train = _npz(train_file)
        classes = _classes(train.labels, self.class_names, train_file)
        train, test = held_out(train, self.test_share, seed, key="test_share") if test_file is None else (train, _npz(test_file))
        if int(test.labels.max()) >= len(classes):
            raise ValueError(f"{test_file} has label {int(test.labels.max())}, the training images have {len(classes)} classes")
        train = limited(train, self.limit, seed, part="train")
        test = limited(test, self.limit, seed, part="test")
        public: Table | None = None
        if self.public_share:
            train, public = held_out(train, self.public_share, seed, key="public_share")
            public = _shown(public, self.size, turn=0)
        return Dataset("image", _shown(train, self.size, self.turn), _shown(test, self.size, self.turn), classes, public)


def resized(images: Tensor, size: int | None) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as (N, C, size, size); as they are if `size` is None."""
    if size is None or images.shape[2:] == (size, size):
        return images
    if size < 1:
        raise ValueError(f"data.size={size}: needed is at least 1 pixel, or data.size=null to keep the images' own size")
    return interpolate(images, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)


def channels_first(images: np.ndarray) -> Tensor:
    """Bytes (N, H, W) or (N, H, W, C) as a tensor (N, C, H, W)."""
    tensor = torch.from_numpy(images)
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2)


def _npz(path: Path) -> Table:
    """Images as bytes (N, C, H, W)."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an npz file; write it with numpy.savez_compressed(path, x=images, y=labels)")
    with np.load(path) as arrays:
        if not {"x", "y"} <= set(arrays):
            raise ValueError(f"{path} holds the arrays {', '.join(arrays)}; needed are x (images) and y (labels)")
        x, y = arrays["x"], arrays["y"]
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        raise ValueError(f"{path}: x is {x.dtype} {x.shape}; needed is uint8 (N, H, W) or (N, H, W, C) with 1 or 3 channels")
    if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1] or not y.size or y.min() < 0:
        raise ValueError(f"{path}: y is {y.dtype} {y.shape} for {len(x)} images; needed is one class index from 0 for every image")
    return Table(channels_first(x), torch.from_numpy(y.astype(np.int64)))


def _classes(labels: Tensor, names: Sequence[str] | None, path: Path) -> tuple[str, ...]:
    if names is None and int(labels.min()) == int(labels.max()):
        raise ValueError(f"{path} needs at least two classes, it has one: {int(labels[0])}")
    highest = int(labels.max())
    if names is None:
        return tuple(map(str, range(highest + 1)))
    if len(names) <= highest:
        raise ValueError(f"data.class_names has {len(names)} names, {path} has labels up to {highest}; give {highest + 1} names or null")
    return tuple(names)


def _shown(table: Table, size: int | None, turn: int) -> Table:
    """A table of bytes as images in [0, 1], resized and turned."""
    assert isinstance(table.inputs, Tensor)
    images = resized(table.inputs.float() / 255, size)
    return Table(torch.rot90(images, k=turn, dims=(2, 3)).contiguous(), table.labels)
