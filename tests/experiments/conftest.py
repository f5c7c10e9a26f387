"""The command line in this process."""

import sys
from collections.abc import Callable

import pytest

from experiments import cli


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The exit code of `fedpeft ARGUMENTS`."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fedpeft", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture
def told(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, output and errors of `fedpeft ARGUMENTS`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = call(*arguments)
        end = capsys.readouterr()
        return code, end.out, end.err

    return run
