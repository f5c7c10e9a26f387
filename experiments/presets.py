"""`fedpeft presets`: what each family has to choose from, and the fields that can be set inside, as the installed presets say it."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedpeft.config import FAMILIES, ConfigError, presets_of

MARK = "_target_"


def described(words: Sequence[str], presets: Path) -> str:
    """Text on all families (no words), on a `family` with the fields of its presets, or on a `family=name`. Raises `ConfigError`."""
    if not words:
        return "\n\n".join("\n".join([f"{family}=", *_names(family, presets)]) for family in FAMILIES)
    return "\n\n".join(text for word in words for text in _of(word, presets))


def _names(family: str, presets: Path) -> Iterator[str]:
    for name in presets_of(family, presets):
        yield f"  {name:<16} {_lines(family, name, presets)[0].removeprefix('# ')}"


def _of(word: str, presets: Path) -> Iterator[str]:
    family, sign, name = word.partition("=")
    _check(family, FAMILIES, f"{word}: there is no family {family}")
    names = presets_of(family, presets)
    if sign:
        _check(name, names, f"{word}: there is no such {family}")
    for one in [name] if sign else names:
        said, *fields = _lines(family, one, presets)
        yield "\n".join([f"{family}={one}  {said}", *(f"  {line}" for line in fields)])


def _check(given: str, known: Sequence[str], fault: str) -> None:
    if given not in known:
        close = difflib.get_close_matches(given, known, 1)
        raise ConfigError(f"{fault}; {f'did you mean {close[0]}? ' if close else ''}There are {', '.join(known)}")


def _lines(family: str, name: str, presets: Path) -> list[str]:
    """The comment that a preset begins with, then its fields as overrides name them; those inside one are indented as in the file."""
    text = (presets / family / f"{name}.yaml").read_text().splitlines()
    fields = [line for line in text if line.strip() and not line.startswith(("#", MARK))]
    said = " ".join(line.removeprefix("# ") for line in text if line.startswith("#"))
    return [f"# {said}", *(line if line.startswith(" ") else f"{family}.{line}" for line in fields)]
