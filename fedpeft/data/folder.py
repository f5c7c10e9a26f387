"""Which file under `data.path` holds the training rows, and which the test rows."""

from pathlib import Path


def find(path: str | None, endings: tuple[str, ...], *, train: str | None = None, test: str | None = None) -> tuple[Path, Path | None]:
    """The training file, and the test file or None if there is none.

    `path` is the training file itself, or a folder whose files are named by `train` and `test` or else start with `train.` and `test.`.
    """
    if path is None:
        raise ValueError(
            f"data.path is not set, and this data set is read from local files: give data.path=FOLDER with train{endings[0]} and "
            f"test{endings[0]}, or data.path=FILE (of {', '.join(endings)})"
        )
    place = Path(str(path)).expanduser()  # a folder called 2024 comes as a number
    if not place.exists():
        raise FileNotFoundError(f"data.path={path}: looked for {place.absolute()}, which does not exist; give a folder or one file")
    if place.is_file():
        if train is not None:
            raise ValueError(f"data.path={path} is the training file already; drop data.train={train}, or give the folder as data.path")
        return place, None if test is None else _named(place.parent, test, "test")
    found = _named(place, train, "train") if train else _starting(place, "train", endings)
    if found is None:
        raise FileNotFoundError(
            f"data.path={path}: looked for a file train.* of {', '.join(endings)}, the folder holds {_listing(place)}; "
            "name the training file with data.train=FILE"
        )
    return found, _named(place, test, "test") if test else _starting(place, "test", endings)


def _named(folder: Path, name: str, key: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"data.{key}={name}: there is no such file in {folder}, which holds {_listing(folder)}")
    return folder / name


def _starting(folder: Path, start: str, endings: tuple[str, ...]) -> Path | None:
    found = [place for place in sorted(folder.iterdir()) if place.name.startswith(f"{start}.") and place.name.endswith(endings)]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {_names(found)}: name the one to read with data.{start}=FILE")
    return found[0] if found else None


def _listing(folder: Path) -> str:
    return _names(sorted(folder.iterdir())) or "nothing"


def _names(places: list[Path], most: int = 8) -> str:
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(place.name for place in places[:most]) + more
