"""The compilers that tests of exported C and of the kernel need. Without one they fail rather than show nothing."""

import shutil

import pytest


def compiler(language: str) -> str:
    """The path of a compiler of "C" or "C++"."""
    names = {"C": ("cc", "gcc", "clang"), "C++": ("c++", "g++", "clang++")}[language]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(f"the tests need a {language} compiler: apt-get install g++")
    return found
