"""Count the rank-one terms of U V that each file of this folder keeps per layer; write terms.json.

python results/mnist-adversarial/terms.py; then `atmc table --page results/mnist-adversarial/README.md` draws the table.
"""

from __future__ import annotations

import json
from pathlib import Path

from atmc.pack.inspect import inspect_file

HERE = Path(__file__).parent


def count_terms(path: Path) -> list[int]:
    """Return the terms of each layer, in the order of the layers; 0 if the file holds the layer's W itself."""
    contents = inspect_file(path)
    kept = {layer: factors["components"] for layer, factors in contents["factorized"].items()}
    return [kept.get(layer, 0) for layer in contents["dead_channels"]]


def main() -> None:
    """Write the counts by run; the dense model has no factors."""
    terms = {path.parent.name: {"terms": count_terms(path)} for path in sorted(HERE.glob("*/model.atmc"))}
    terms["dense"]["terms"] = []
    (HERE / "terms.json").write_text(json.dumps(terms, indent=1) + "\n")


if __name__ == "__main__":
    main()
