"""Find the compilers that tests of exported C and of the kernel need; without one these fail and are not skipped."""

import shutil

import pytest


def find_compiler(language: str) -> str:
    """Return the path of a compiler of "C" or "C++"."""
    names = {"C": ("cc", "gcc", "clang"), "C++": ("c++", "g++", "clang++")}[language]
    path = next((path for name in names if (path := shutil.which(name))), None)
    if path is None:
        pytest.fail(f"the tests need a {language} compiler: apt-get install g++")
    return path
