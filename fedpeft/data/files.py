"""Text from local files: csv, tsv, jsonl (each also as .gz) and parquet."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fedpeft.data.folder import find
from fedpeft.data.rows import Reading, Rows
from fedpeft.data.table import Dataset

ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Files(Reading):
    """A folder with a training file and, if it has one, a test file; or one file, of which `test_share` is held out."""

    path: str | None = None  # a folder, or the training file
    train: str | None = None  # file in the folder; null: the one that starts with `train.`
    test: str | None = None  # likewise

    def read(self, seed: int) -> Dataset:
        """Texts or pairs of texts."""
        if self.task not in ("text", "language"):
            raise ValueError(
                f"data.task={self.task}: files of rows hold text or language; for images use data=fashion_mnist with data.path="
            )
        train, test = find(self.path, ENDINGS, train=self.train, test=self.test)
        return self.dataset(rows_of(train), None if test is None else rows_of(test), seed, self.texts)


def rows_of(path: Path) -> Rows:
    """Every row of one file, in order."""
    if not path.name.endswith(ENDINGS):
        raise ValueError(f"{path} cannot be read; needed is a file of {', '.join(ENDINGS)}")
    if path.suffix == ".parquet":
        return _parquet(path)
    try:
        # utf-8-sig: what spreadsheets write opens with a byte order mark that would else stick to the first column's name.
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, mode="rt", encoding="utf-8-sig", newline="") as lines:
            if ".jsonl" in path.suffixes[-2:]:
                return _jsonl(path.name, lines)
            return _csv(path.name, lines, delimiter="\t" if ".tsv" in path.suffixes[-2:] else ",")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not utf-8 ({error.reason}); convert it first") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again") from error


def _csv(name: str, lines: TextIO, delimiter: str) -> Rows:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{name} names a column twice: {', '.join(header)}; rename one")
        columns: list[list[object]] = [[] for _ in header]
        for fields in filter(None, reader):
            if len(fields) != len(header):
                raise ValueError(
                    f"line {reader.line_num} of {name} has {len(fields)} fields, the header has {len(header)}; is a quote missing?"
                )
            for column, field in zip(columns, fields, strict=True):
                column.append(field)
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num} of {name} is not well-formed: {error}; quote such a field and double its quotes, or convert to .jsonl"
        ) from error
    return Rows(name, dict(zip(header, columns, strict=True)))


def _jsonl(name: str, lines: Iterable[str]) -> Rows:
    rows: list[dict[str, object]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {name} is not JSON: {error}; needed is one object a line") from error
        if not isinstance(row, dict):
            raise ValueError(
                f'line {number} of {name} is a {type(row).__name__}; needed is an object such as {{"text": ..., "label": ...}}'
            )
        rows.append(row)
    names = dict.fromkeys(key for row in rows for key in row)
    return Rows(name, {key: [row.get(key) for row in rows] for key in names})


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs pyarrow: pip install pyarrow, or convert it to .jsonl.gz") from error
    try:
        return Rows(path.name, parquet.read_table(path).to_pydict())
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file ({error}); fetch it again") from error
