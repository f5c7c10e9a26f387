"""Data from the Hugging Face hub, or from a local folder that `datasets.load_dataset` can read."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.data.images import channels_first, resized
from fedpeft.data.rows import Reading, Rows
from fedpeft.data.table import Dataset


@dataclass(frozen=True, kw_only=True)
class Hub(Reading):
    """A data set by its hub id. A column of class numbers is read by its class names; the hub's class -1 is no label."""

    id: str | None = None  # hub id such as PolyAI/banking77, or a local folder
    name: str | None = None  # the data set's configuration, such as sst2 of glue
    image: str | None = None  # column of the image, for task=image
    size: int | None = None  # pixels of a side to resize images to
    train_split: str = "train"
    test_split: str | None = "test"  # null: `test_share` of the training rows is held out

    def read(self, seed: int) -> Dataset:
        """Texts, pairs of texts or images (N, C, H, W) in [0, 1]."""
        if self.task not in ("text", "image", "language"):
            raise ValueError(f"data.task={self.task}: needed is text, image or language")
        for key in ("text", "text_pair") if self.task == "image" else ("image", "size"):
            if getattr(self, key) is not None:
                raise ValueError(f"data.{key}={getattr(self, key)} means nothing for data.task={self.task}; set data.{key}=null")
        train = self._rows(self.train_split)
        test = None if self.test_split is None else self._rows(self.test_split)
        return self.dataset(train, test, seed, self._images if self.task == "image" else self.texts)

    def _rows(self, split: str) -> Rows:
        if self.id is None:
            raise ValueError("data.id is not set; give a hub id such as data.id=PolyAI/banking77, or a local folder")
        library = _datasets()
        try:
            loaded = library.load_dataset(self.id, self.name, split=split)
        except Exception as error:  # the library raises its own, its HTTP client's and plain errors for the same causes
            raise ValueError(
                f"data.id={self.id} data.name={self.name}, split {split}: cannot be loaded ({type(error).__name__}: {error}). "
                "Is the hub in reach, and do data.name, data.train_split and data.test_split exist? "
                "Without a network give a local folder, or use data=files"
            ) from error
        columns: dict[str, Sequence[object]] = {column: loaded[column] for column in loaded.column_names}
        feature = loaded.features.get(self.label)
        if self.label is not None and isinstance(feature, library.ClassLabel):
            columns[self.label] = [None if value is None or value < 0 else feature.names[value] for value in loaded[self.label]]
        return Rows(f"{self.id} ({split})", columns)

    def _images(self, rows: Rows) -> Tensor:
        pictures: list[Any] = list(rows.column(self.image, "image"))
        if not all(hasattr(picture, "convert") for picture in pictures):
            raise ValueError(f"data.image={self.image}: {rows.name} holds no images in that column; does it have the hub's Image feature?")
        mode = "L" if all(picture.mode in ("1", "L") for picture in pictures) else "RGB"
        if self.size is None and len({picture.size for picture in pictures}) > 1:
            raise ValueError(f"data.image={self.image}: the images of {rows.name} differ in size; give one with data.size=PIXELS")
        return torch.cat([resized(channels_first(np.array(p.convert(mode))[None]).float() / 255, self.size) for p in pictures])


def _datasets() -> ModuleType:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "data=hub needs the hub's library: pip install datasets; data=files reads local files without it"
        ) from error
    return datasets  # type: ignore[no-any-return]  # untyped library
