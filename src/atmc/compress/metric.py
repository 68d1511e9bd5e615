"""How much an entry of a compressed tensor matters: what the budget ranks by, and what the codebooks weigh errors by.

Legend: x an entry; v the running mean of its squared gradients; e the size of the change of W if x became zero, which
is |x| for an entry of W or C, |u_ij| times the norm of row j of V for U, and |v_jk| times the norm of column j of U for
V (the identity of the shifted forms added).

The budget keeps the entries of largest e^(1 - s) (|x| sqrt(v))^s, s being the sensitivity. s = 0 compares effects on W
alone, which depend on the arbitrary scale of layers; s = 1 compares first-order changes of the loss (Molchanov et al.
2017), which does not, but is noisy; a small s tells apart what size alone does not. An entry without any gradient for
`SILENT_STEPS` steps ranks behind all others, whatever its size: it belongs to a unit that is always off, or that
nothing leads to or from. It leaves when its place is wanted: while there is room, the unit may come on again.

Rounding x to q costs about v (x - q)^2 / 2 of the loss if v stands for the curvature. Adam takes its steps in the
metric sqrt(v), and the k-means of ADMM's second step belongs to the same metric: it weighs squared errors by sqrt(v).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atmc.compress.factorize import factor_structure

Tensors = Mapping[str, Tensor]
DECAY = 0.999  # of the running means, as in Adam
FEWEST_STEPS = 20  # before the means of a tensor count
SILENT_STEPS = 100  # without any gradient, after which an entry ranks last
SILENT_SCORE = 1e-9  # times what it would be otherwise
TINY = 1e-24  # added to v, so that entries without any gradient are still ranked by size


@dataclass(frozen=True)
class Metric:
    """Weights of entries by name of their tensor; a tensor that is missing has weights of 1.

    Args:
        ranking: what |x| is multiplied by where entries are ranked, (..) broadcast to the tensor's shape.
        rounding: weight of the squared error of rounding an entry, shaped like the tensor.
    """

    ranking: Tensors = field(default_factory=dict)
    rounding: Tensors = field(default_factory=dict)

    def scores(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return by what the entries of the tensors are ranked: never negative, 0 where an entry has no effect on W."""
        return {
            name: tensor.abs() * self.ranking[name].to(tensor.dtype) if name in self.ranking else tensor.abs()
            for name, tensor in tensors.items()
        }


@dataclass
class Moments:
    """Running means of the squared gradients of parameters, like Adam's: name -> sum, and the steps that it is over.

    The sums start at zero and are not corrected for that: they only serve to compare entries of the same age. `silent`
    counts the steps since an entry last had a gradient, as int16.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    silent: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the gradients that the parameters have now.

        A parameter without one, since the user froze it, counts as gradient 0 in the means, but not as silent.
        """
        for name, parameter in tensors.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(parameter, dtype=torch.float32)
                self.silent[name] = torch.zeros_like(parameter, dtype=torch.int16)
                self.steps[name] = 0
            self.sums[name].mul_(DECAY)
            if parameter.grad is not None:
                self.silent[name].add_(1).clamp_max_(SILENT_STEPS)
                self.sums[name].addcmul_(parameter.grad, parameter.grad, value=1 - DECAY)
                self.silent[name].masked_fill_(parameter.grad != 0, 0)
            self.steps[name] += 1

    def cover(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether the means of all these tensors are over enough steps to rank their entries by."""
        return all(self.steps.get(name, 0) >= FEWEST_STEPS for name in tensors)

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Forget tensors that are not among these, or have another shape."""
        for name in list(self.sums):
            if name not in tensors or tensors[name].shape != self.sums[name].shape:
                del self.sums[name], self.silent[name], self.steps[name]

    def state(self) -> dict[str, Any]:
        """Return the state as plain tensors and numbers, for a checkpoint."""
        return {"sums": dict(self.sums), "steps": dict(self.steps), "silent": dict(self.silent)}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Moments:
        """Return the moments that `state` returned."""
        return cls(dict(state["sums"]), dict(state["steps"]), dict(state["silent"])) if state else cls()


@torch.no_grad()
def measure_metric(
    model: nn.Module, tensors: Tensors, moments: Moments, *, sensitivity: float, effects: bool, weighted: bool
) -> Metric:
    """Return the metric of a model as it is now.

    Args:
        model: whose parameters, or values for them, the tensors are.
        tensors: name -> value, named as in `factorize.compressible_parameters`.
        moments: of the tensors; without effect until they cover all of them.
        sensitivity: s, in [0, 1].
        effects: rank the entries of U and V by their effect on W; if not, by magnitude (Gui et al. 2019).
        weighted: weigh errors of rounding by sqrt(v).
    """
    ranking: dict[str, Tensor] = _norms_of_partners(model, tensors) if effects else {}
    rounding: dict[str, Tensor] = {}
    for name in tensors if moments.cover(tensors) else ():
        if sensitivity:
            root = (moments.sums[name] + TINY).pow(sensitivity / 2)
            root = torch.where(moments.silent[name] >= SILENT_STEPS, root * SILENT_SCORE, root)
            partner = ranking.get(name)
            ranking[name] = root if partner is None else partner.pow(1 - sensitivity) * root
        if weighted:
            rounding[name] = moments.sums[name].sqrt()
    return Metric(ranking, rounding)


def _norms_of_partners(model: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
    """Return for each U the norms of V's rows (rank,), and for each V those of U's columns (rank, 1)."""
    norms: dict[str, Tensor] = {}
    for path, (form, _) in factor_structure(model).items():
        if f"{path}.U" not in tensors:
            continue
        u, v = tensors[f"{path}.U"].detach(), tensors[f"{path}.V"].detach()
        columns, rows = u.square().sum(0), v.square().sum(1)
        if form == "left":  # (U + I) V
            columns = columns + 2 * u.diagonal() + 1
        if form == "right":  # U (V + I)
            rows = rows + 2 * v.diagonal() + 1
        norms[f"{path}.U"] = rows.clamp_min(0).sqrt()
        norms[f"{path}.V"] = columns.clamp_min(0).sqrt()[:, None]
    return norms
