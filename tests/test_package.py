"""`import atmc` loads nothing heavy, and its public names are there in whatever order things are imported."""

import subprocess
import sys

import pytest

import atmc


def run(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_no_torch():
    assert run("import atmc, sys; print(atmc.__version__, 'torch' in sys.modules)") == f"{atmc.__version__} False"


def test_every_public_name_is_listed_and_there():
    assert set(atmc.__all__) <= set(dir(atmc))
    assert "importlib" not in dir(atmc)
    for name in atmc.__all__:
        assert getattr(atmc, name) is getattr(atmc, name)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'atmc' has no attribute 'decompress'"):
        atmc.decompress  # noqa: B018


@pytest.mark.parametrize("room", ["data", "deploy", "models", "pack", "robust"])
def test_subpackages_are_attributes(room):
    assert run(f"import atmc; print(atmc.{room}.__name__)") == f"atmc.{room}"


@pytest.mark.parametrize(
    "code",
    [
        "import atmc.compress.projections; import atmc",
        "import atmc; atmc.Budget(ratio=0.1)",
        "import atmc; atmc.compress; from atmc.compress import admm",
    ],
)
def test_compress_is_the_function_whatever_was_imported_first(code):
    """The subpackage of the same name stays importable, and does not take the function's place."""
    code += "; from atmc.compress.projections import keep_largest"
    code += "; print(callable(atmc.compress), keep_largest.__name__)"
    assert run(code) == "True keep_largest"
