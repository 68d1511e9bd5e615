"""Call the command line as a user does."""

import sys

import pytest

from atmc.cli.main import main


def call(*arguments: object) -> int:
    """Run a command and return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["atmc", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return stopped.value.code or 0


def expect_refusal(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 2) -> str:
    """Run a command that must end with this status, and return the one line that it writes to stderr."""
    capsys.readouterr()
    assert call(*arguments) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("atmc: ")
    assert "Traceback" not in lines[0]
    return lines[0]
