"""Help, the version and wrong arguments are answered without torch, whose import takes seconds."""

import subprocess
import sys

import pytest

CODE = """
import runpy, sys
try:
    runpy.run_module("atmc", run_name="__main__", alter_sys=True)
except SystemExit as stopped:
    print("status", stopped.code or 0)
print("torch loaded", "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 0, "compress"),
        (["--help"], 0, "evaluate"),
        (["--version"], 0, "atmc "),
        (["comprss"], 2, "comprss"),
        (["compress", "--bogus"], 2, "--bogus"),
        (["evaluate"], 2, "Missing"),
        (["evaluate", "a.atmc", "--data", "digits"], 2, "--threat"),
        (["inspect"], 2, "Missing"),
        (["export", "a.atmc", "--n", "many"], 2, "--n"),
        (["bench", "a.atmc", "--reps", "x"], 2, "--reps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_without_torch(arguments, status, words):
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert words in done.stdout + done.stderr
    assert f"status {status}\n" in done.stdout
    assert "torch loaded False" in done.stdout
