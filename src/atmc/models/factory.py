"""Build a user's own model from ``package.module:factory``, a callable ``factory(num_classes=...) -> nn.Module``.

An error in the factory or its module becomes one sentence that names it.
"""

from __future__ import annotations

import importlib
import inspect
import os
import reprlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from atmc.core.errors import unknown

USER_CODE_ERRORS = (  # what a mistake in a user's code raises; exceptions of other classes pass through
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def call_factory(factory: Callable[..., nn.Module], num_classes: int, name: str | None = None) -> nn.Module:
    """Return the module that a user's factory builds for a number of classes.

    Args:
        name: the factory's name in errors; by default ``module:name`` of its definition.

    Raises:
        ValueError: it does not take num_classes alone, fails with one of `USER_CODE_ERRORS`, or returns no nn.Module.
    """
    name = name or factory_name(factory)
    try:
        inspect.signature(factory).bind(num_classes=num_classes)
    except TypeError as error:
        raise ValueError(f"expected {name} to be callable with num_classes alone: {error}") from error
    try:
        with _current_folder_importable():  # a factory may import more when it is called
            model: object = factory(num_classes=num_classes)
    except USER_CODE_ERRORS as error:
        raise ValueError(f"the factory {name} failed for num_classes={num_classes}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected {name} to return a torch.nn.Module, got {type(model).__name__}")
    return model


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Put the current folder first on the path of imports within the context."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def factory_name(factory: Callable[..., nn.Module]) -> str:
    """Return ``module:name`` of a factory's definition, as on the command line; its repr if it has no name."""
    names = getattr(factory, "__module__", None), getattr(factory, "__qualname__", None)
    return ":".join(map(str, names)) if all(names) else reprlib.repr(factory)


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of its message, ``KeyError: 'width'``."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def import_factory(name: str) -> Callable[..., nn.Module]:
    """Import the callable of ``package.module:factory``, with the current folder first on the path.

    Raises:
        ValueError: the name is not of this form, or the module cannot be imported or has no such callable.
    """
    module_name, _, attribute = name.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"expected a factory as package.module:factory, got {name!r}")
    try:
        with _current_folder_importable():
            importlib.invalidate_caches()
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name!r} of the factory {name}: {error}") from error
    except USER_CODE_ERRORS as error:
        raise ValueError(f"cannot import {module_name!r} of the factory {name}: {first_line(error)}") from error
    if not hasattr(module, attribute):
        raise unknown("factory", attribute, dir(module), expected=f"a callable of the module {module_name!r}")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise ValueError(f"expected {name} to be callable, got {type(factory).__name__}")
    return cast(Callable[..., nn.Module], factory)
