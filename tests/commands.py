"""The command line as a user calls it."""

import sys

import pytest

from atmc.cli.main import main


def call(*arguments: object) -> int:
    """The exit status of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["atmc", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return stopped.value.code or 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 2) -> str:
    """What a command that ends with this status says in one line on stderr."""
    capsys.readouterr()
    assert call(*arguments) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("atmc: ")
    assert "Traceback" not in lines[0]
    return lines[0]
