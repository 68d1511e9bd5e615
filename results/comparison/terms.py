"""How many sparse rank-one terms pay in dense networks before they are pruned, by budget and profit (terms.json)?

"Saved" is what the terms lower J by (`compress/sparse_factors.py`), in nonzeros: their own are paid for already.

python results/comparison/terms.py; then `atmc table --page results/comparison/README.md` draws the table.
"""

from __future__ import annotations

from pathlib import Path

import torch

import atmc
from atmc.commands.outputs import write_json
from atmc.compress.factorize import compressible_parameters, compressible_weights
from atmc.compress.sparse_factors import factorize_if_it_pays
from atmc.training.equalize import equalize

HERE = Path(__file__).parent
DENSE = ("mnist", "mnist-adversarial")  # LeNets trained for interval bounds, and against PGD
RATIOS, PROFITS = (0.0015, 0.006, 0.02, 0.05, 0.2), (0.0, 1.0)


def main() -> None:
    """Write the counts for each network, ratio and profit."""
    torch.set_num_threads(1)
    rows = []
    for folder in DENSE:
        for ratio in RATIOS:
            for profit in PROFITS:
                model = atmc.load(HERE.parent / folder / "dense" / "model.atmc").eval()
                equalize(model, (1, 28, 28))
                matrices = {site.path: site.tensor.detach().clone() for site in compressible_weights(model)}
                weights = sum(value.numel() for value in matrices.values())
                entries = torch.cat([value.flatten() for value in matrices.values()])
                price = entries.square().topk(int(ratio * weights)).values[-1]
                terms = factorize_if_it_pays(model, int(ratio * weights), profit=profit)
                tensors = {name: value.detach() for name, value in compressible_parameters(model).items()}
                factors = [tensors[f"{path}.{name}"] for path in terms for name in "UV"]
                row = {"network": f"{folder}/dense", "ratio": ratio, "budget": int(ratio * weights), "profit": profit}
                row |= {"terms": sum(terms.values()), "weights": len(terms)}
                row["nonzeros"] = sum(int(value.count_nonzero()) for value in factors)
                cost = sum(float((matrices[path].square() / price).clamp_max(1).sum()) for path in terms)
                rest = sum(float((tensors[f"{path}.C"].square() / price).clamp_max(1).sum()) for path in terms)
                row["saved"] = round(cost - rest - row["nonzeros"], 1)
                rows.append(row)
                print(row, flush=True)
    write_json(HERE / "terms.json", {"rows": rows})


if __name__ == "__main__":
    main()
