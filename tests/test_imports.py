"""Imports run down the list of docs/design.md, and compress/ and robust/ do not know each other."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "atmc"
LAYERS = [  # from the top down; a line may import from the lines below it, and within itself where it is a package
    ["__main__"],
    ["cli"],
    ["__init__"],
    ["experiment"],
    ["api"],
    ["judge"],
    ["inputs", "methods"],
    ["phases"],
    ["finish"],
    ["idle", "recipe", "train"],
    ["deploy"],
    ["pack"],
    ["compress", "robust"],
    ["models", "data"],
    ["augment", "images"],
    ["sources"],
    ["files", "numerics", "rng", "version"],
]
RANK = {name: depth for depth, names in enumerate(LAYERS) for name in names}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found.append((parts[0], path))
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "atmc":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("atmc.")}
    return names


def test_every_module_has_its_place():
    assert {top for top, _ in modules()} == set(RANK)


def test_imports_run_down():
    for top, path in modules():
        for name in imported(path):
            if name == top:
                continue
            assert RANK[name] > RANK[top], f"{path.name} ({top}) imports {name}, which stands above or beside it"


def test_no_file_is_too_long():
    assert {path.name: n for _, path in modules() if (n := len(path.read_text().splitlines())) > 400} == {}
