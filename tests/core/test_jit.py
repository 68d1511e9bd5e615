"""Functions are compiled where nothing can be cached, too."""

import pytest

numba = pytest.importorskip("numba")
from numba.core import caching  # noqa: E402

from atmc.core.jit import compile_function  # noqa: E402


def add(a, b):
    return a + b


@pytest.mark.parametrize("signature", [None, "int64(int64, int64)"])
def test_an_installation_that_cannot_be_written(monkeypatch, signature):
    def refuse(self):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", refuse)
    assert compile_function(add, signature)(2, 3) == 5


def test_a_disk_that_is_full(monkeypatch):
    def refuse(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", refuse)
    assert compile_function(add, "int64(int64, int64)")(2, 3) == 5
