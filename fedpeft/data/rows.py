"""Raw rows, from a file or a hub, and how they become a Dataset."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.data.table import Dataset, Inputs, Table, Task, held_out, limited


@dataclass(frozen=True, eq=False)
class Rows:
    """A raw table: named columns of equal length. `name` says in an error where it came from."""

    name: str
    columns: Mapping[str, Sequence[object]]

    def column(self, name: str | None, key: str) -> Sequence[object]:
        """The column that the config field `data.<key>` names."""
        if name is None:
            raise ValueError(f"data.{key} is not set; name the column with data.{key}=COLUMN, {self.name} has {', '.join(self.columns)}")
        if name not in self.columns:
            raise ValueError(f"data.{key}={name}: {self.name} has no such column, it has {', '.join(self.columns) or 'none'}")
        return self.columns[name]

    def texts(self, name: str | None, key: str) -> tuple[str, ...]:
        """A column of texts, none of them empty."""
        values = list(self.column(name, key))
        for number, value in enumerate(values, start=1):
            if not isinstance(value, str) or not value.strip():
                what = f"holds a {type(value).__name__}" if value is not None and not isinstance(value, str) else "is empty"
                raise ValueError(
                    f"row {number} of {self.name}: column {name} {what}, needed is a text; remove the row or change data.{key}"
                )
        return tuple(map(str, values))

    def names(self, name: str | None, key: str) -> list[str | None]:
        """A column of labels or owners as strings; None where the cell is empty."""
        return [None if value is None or value == "" else str(value) for value in self.column(name, key)]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which column of a raw table is what, and which of its rows are kept."""

    task: Task = "text"
    text: str | None = None  # column of the text
    text_pair: str | None = None  # column of the second text (a hypothesis, an answer)
    label: str | None = None  # column of the class; null for language
    class_names: Sequence[str] | None = None  # all there may be, in the order of their numbers; null: those of the training rows
    group: str | None = None  # column of the natural owner
    test_share: float = 0.2  # of the rows, held out if the data has no test
    limit: int | None = None  # rows kept of train and of test each, for trials
    min_group: int = 1  # training examples a natural owner needs
    public_small_groups: bool = False  # language: examples of smaller owners become public; otherwise they are left out
    drop_unlabelled: bool = False  # leave out rows without a label
    drop_unseen: bool = False  # leave out rows whose label is none of the classes

    def dataset(self, train: Rows, test: Rows | None, seed: int, inputs: Callable[[Rows], Inputs]) -> Dataset:
        """The data set of raw rows. Unless they are named, classes come from all of `train`, before any row is held out or limited."""
        self._check()
        classes = self._classes(train)
        whole = self._table(train, classes, inputs)
        kept, tested = (
            held_out(whole, self.test_share, seed, key="test_share") if test is None else (whole, self._table(test, classes, inputs))
        )
        kept, public = self._large_groups(limited(kept, self.limit, seed, part="train"))
        return Dataset(self.task, kept, limited(tested, self.limit, seed, part="test"), classes, public)

    def texts(self, rows: Rows) -> Inputs:
        """The texts of `rows`, or the pairs if there is a second column."""
        first = rows.texts(self.text, "text")
        if self.text_pair is None:
            return first
        return tuple(zip(first, rows.texts(self.text_pair, "text_pair"), strict=True))

    def _check(self) -> None:
        if self.task == "language" and self.label is not None:
            raise ValueError(
                f"data.label={self.label}: language modelling has no classes; set data.label=null, "
                f"or use the column as the owner with data.group={self.label}"
            )
        if self.task == "language" and self.class_names is not None:
            raise ValueError(f"data.class_names={list(self.class_names)}: language modelling has no classes; set data.class_names=null")
        if self.group is None and (self.min_group > 1 or self.public_small_groups):
            raise ValueError(
                f"data.min_group={self.min_group} data.public_small_groups={self.public_small_groups}: needed is the column of the owner, "
                "data.group=COLUMN"
            )
        if self.public_small_groups and self.task != "language":
            raise ValueError(f"data.public_small_groups=true is for data.task=language, not {self.task}; set it to false")

    def _classes(self, rows: Rows) -> tuple[str, ...]:
        if self.task == "language":
            return ()
        if self.class_names is not None:
            if len(self.class_names) < 2 or len(set(map(str, self.class_names))) < len(self.class_names):
                raise ValueError(f"data.class_names={list(self.class_names)}: needed are two names or more, each another")
            return tuple(map(str, self.class_names))
        classes = {name for name in rows.names(self.label, "label") if name is not None}
        if len(classes) < 2:
            raise ValueError(
                f"data.label={self.label}: needs at least two classes, {rows.name} has {', '.join(classes) or 'none'}; is it the label?"
            )
        numbers = all(re.fullmatch("-?[0-9]+", name) for name in classes)
        return tuple(sorted(classes, key=lambda name: (int(name), name) if numbers else (0, name)))

    def _table(self, rows: Rows, classes: tuple[str, ...], inputs: Callable[[Rows], Inputs]) -> Table:
        table = Table(inputs(rows), self._labels(rows, classes), self._groups(rows))
        kept = (table.labels >= 0).nonzero().flatten()
        if not len(kept):
            raise ValueError(
                f"none of the {len(table)} rows of {rows.name} can be used: data.drop_unlabelled={self.drop_unlabelled}, "
                f"data.drop_unseen={self.drop_unseen}; name another file or split"
            )
        return table if len(kept) == len(table) else table.rows(kept)

    def _labels(self, rows: Rows, classes: tuple[str, ...]) -> Tensor:
        """Class indices, -1 for a row to be left out."""
        if self.task == "language":
            return torch.zeros(len(rows.column(self.text, "text")), dtype=torch.int64)
        index = {name: at for at, name in enumerate(classes)}
        names = rows.names(self.label, "label")
        for number, name in enumerate(names, start=1):
            if name is None and not self.drop_unlabelled:
                raise ValueError(
                    f"row {number} of {rows.name} has no label in column {self.label}; remove it or set data.drop_unlabelled=true"
                )
            if name is not None and name not in index and not self.drop_unseen:
                where = "which no training row has" if self.class_names is None else "which is not one of data.class_names"
                raise ValueError(f"row {number} of {rows.name} has the label {name}, {where}; remove it or set data.drop_unseen=true")
        return torch.tensor([-1 if name is None else index.get(name, -1) for name in names], dtype=torch.int64)

    def _groups(self, rows: Rows) -> tuple[str, ...] | None:
        if self.group is None:
            return None
        groups = rows.names(self.group, "group")
        if None in groups:
            raise ValueError(
                f"row {groups.index(None) + 1} of {rows.name} has no owner in column {self.group}; remove it or change data.group"
            )
        return tuple(map(str, groups))

    def _large_groups(self, table: Table) -> tuple[Table, Table | None]:
        """The rows of owners with at least `min_group` of them, and the others if they are to be public."""
        if table.groups is None or self.min_group <= 1:
            return table, None
        sizes = Counter(table.groups)
        large = torch.tensor([sizes[group] >= self.min_group for group in table.groups])
        if not large.any():
            raise ValueError(f"data.min_group={self.min_group}: the largest owner has {max(sizes.values())} training examples; lower it")
        public = table.rows((~large).nonzero().flatten()) if self.public_small_groups and not large.all() else None
        return table.rows(large.nonzero().flatten()), public
