"""A user's own model: ``package.module:factory``, a callable ``factory(num_classes=...) -> nn.Module``.

What the factory or its module raises becomes one sentence that names it.
"""

from __future__ import annotations

import importlib
import inspect
import os
import reprlib
import sys
from collections.abc import Callable
from typing import cast

from torch import nn

from atmc.core.errors import unknown

USER_CODE_ERRORS = (  # what a user's code that has a mistake raises; an exception class of its own is not among them
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
    """The module that a user's factory makes for so many classes.

    Args:
        name: what to call the factory in errors; by default where it was defined.

    Raises:
        ValueError: it does not take num_classes alone, fails with one of `USER_CODE_ERRORS`, or returns no nn.Module.
    """
    name = name or factory_name(factory)
    try:
        inspect.signature(factory).bind(num_classes=num_classes)
    except TypeError as error:
        raise ValueError(f"expected {name} to be callable with num_classes alone: {error}") from error
    try:
        model: object = factory(num_classes=num_classes)
    except USER_CODE_ERRORS as error:
        raise ValueError(f"the factory {name} failed for num_classes={num_classes}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected {name} to return a torch.nn.Module, got {type(model).__name__}")
    return model


def factory_name(factory: Callable[..., nn.Module]) -> str:
    """``module:name`` where a factory was defined, as on the command line; its repr where it has no name."""
    names = getattr(factory, "__module__", None), getattr(factory, "__qualname__", None)
    return ":".join(map(str, names)) if all(names) else reprlib.repr(factory)


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says, ``KeyError: 'width'``."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def import_factory(name: str) -> Callable[..., nn.Module]:
    """The callable of ``package.module:factory``, imported with the current folder first on the path.

    Raises:
        ValueError: no such name, or the module cannot be imported or has no such callable.
    """
    module_name, _, attribute = name.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"expected a factory as package.module:factory, got {name!r}")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name!r} of the factory {name}: {error}") from error
    except USER_CODE_ERRORS as error:
        raise ValueError(f"cannot import {module_name!r} of the factory {name}: {first_line(error)}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    if not hasattr(module, attribute):
        raise unknown("factory", attribute, dir(module), expected=f"a callable of the module {module_name!r}")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise ValueError(f"expected {name} to be callable, got {type(factory).__name__}")
    return cast(Callable[..., nn.Module], factory)
