"""Imports run down the list of docs/design.md, and compress/ and robust/ do not import each other."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "atmc"
LAYERS = [  # from the top down: a room may import from the rooms below it, and within itself
    ["__main__", "__init__"],  # both import lazily
    ["cli"],
    ["commands"],
    ["report"],
    ["api"],
    ["training"],
    ["evaluation"],
    ["deploy"],
    ["pack"],
    ["compress", "robust"],
    ["models"],
    ["data"],
    ["core"],
]
DEPLOY = [["engine"], ["export"], ["graph"]]  # the rooms within deploy/, from the top down
FILES = sorted(SOURCE.rglob("*.py"))


def find_layer(parts: tuple[str, ...], layers: list[list[str]]) -> int:
    """Return the position of a module's first part among the layers."""
    return next(depth for depth, names in enumerate(layers) if parts[0] in names)


def list_imports(path: Path) -> set[tuple[str, ...]]:
    """Return the modules of atmc that a file imports anywhere, as parts below ``atmc``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "atmc":
            parts = tuple(node.module.split(".")[1:])
            names |= {(*parts, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("atmc.")}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_down(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    own = find_layer(parts, LAYERS)
    for name in list_imports(path):
        if name[0] != parts[0]:
            assert find_layer(name, LAYERS) > own, (
                f"{'/'.join(parts)} imports {'.'.join(name)}, which stands above or beside"
            )
        elif parts[0] == "deploy" and len(parts) > 2 and name[1] != parts[1]:
            assert find_layer(name[1:], DEPLOY) > find_layer(parts[1:], DEPLOY), f"{parts} imports {'.'.join(name)}"
