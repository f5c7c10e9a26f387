"""Data that needs no download: scikit-learn's digits, turned."""

from dataclasses import dataclass

import torch

from fedpeft import seeds
from fedpeft.data.table import Dataset, Table

UPRIGHT, TRAIN = 900, 600  # of 1,797 images; the last 297 are the test


@dataclass(frozen=True)
class TurnedDigits:
    """scikit-learn's 8x8 digits: 900 upright ones are public, 600 turned by 90 degrees are dealt to clients, 297 turned ones are the test.

    A base model that knows upright digits reads turned ones at 0.13, so there is something to adapt to.
    """

    split_seed: int | None = None  # which image goes where; None: the seed given to `read`

    def read(self, seed: int) -> Dataset:
        """Images (N, 1, 8, 8) in [0, 1]."""
        from sklearn.datasets import load_digits  # a second to import, and only this data set needs it

        pixels, digits = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
        upright = Table(images, torch.from_numpy(digits).long())
        turned = Table(torch.rot90(images, k=1, dims=(2, 3)), upright.labels)
        split = seed if self.split_seed is None else self.split_seed
        order = torch.randperm(len(upright), generator=seeds.generator(split, purpose="digits"))
        public, train, test = order.tensor_split((UPRIGHT, UPRIGHT + TRAIN))
        return Dataset("image", turned.rows(train), turned.rows(test), tuple("0123456789"), upright.rows(public))
