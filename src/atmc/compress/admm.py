"""The ADMM step that holds the parameters near a codebook (Gui et al. 2019, algorithm 1).

Legend: theta the parameters; theta' (copy) their quantized copy; u (dual) the scaled dual; rho the penalty. The
training loop minimizes f(theta) + rho/2 |theta - theta' + u|^2 under the nonzero budget; every `interval` steps
`step` refreshes theta' and u:

    theta' <- ZeroKmeans(theta + u)        u <- u + theta - theta'

theta' and u differ from zero only where theta is, or once was, nonzero: they are stored there alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from atmc.compress.constraints import Codebook


@dataclass(frozen=True)
class Share:
    """theta' and u of one tensor: positions (m,) int64 into its flat form, copy and dual (m,) float32."""

    positions: Tensor
    copy: Tensor
    dual: Tensor


@dataclass(frozen=True)
class Admm:
    """The whole state of ADMM, a value: `step` returns the next one.

    Args:
        codebook: the constraint on theta'.
        rho: penalty, the paper's default 0.1.
        balance: adapt rho by residual balancing (Boyd et al. 2011, section 3.4.1).
        shares: name -> Share.
        centers: name -> the last codebook, the next one's warm start.
        primal: |theta - theta'| at the last step.
        dual: rho |theta' - previous theta'| at the last step.
    """

    codebook: Codebook
    rho: float = 0.1
    balance: bool = False
    shares: Mapping[str, Share] = field(default_factory=dict)
    centers: Mapping[str, Tensor] = field(default_factory=dict)
    primal: float = math.nan
    dual: float = math.nan

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho > 0):
            raise ValueError(f"expected a finite rho > 0, got {self.rho}")

    @torch.no_grad()
    def step(self, tensors: Mapping[str, Tensor]) -> Admm:
        """theta' and u refreshed for the parameters as they are now."""
        positions, sums, duals, previous = {}, {}, {}, {}
        for name, theta in tensors.items():
            flat = theta.flatten()
            where = self._positions(name, flat)
            copy, dual = self._at(name, where, flat)
            positions[name], sums[name], duals[name], previous[name] = where, flat[where] + dual, dual, copy
        copies, centers = self.codebook.quantize(sums, self.centers)
        shares, primal, change = {}, 0.0, 0.0
        for name, theta in tensors.items():
            where, copy = positions[name], copies[name]
            gap = theta.flatten()[where] - copy
            primal += float(gap.double().square().sum())
            change += float((copy - previous[name]).double().square().sum())
            shares[name] = _compact(Share(where, copy, duals[name] + gap), theta)
        state = replace(
            self, shares=shares, centers=centers, primal=math.sqrt(primal), dual=self.rho * math.sqrt(change)
        )
        return state._balanced() if self.balance else state

    @torch.no_grad()
    def add_penalty_gradient(self, tensors: Mapping[str, Tensor]) -> None:
        """Add rho (theta - theta' + u) to each tensor's .grad, in place; nothing before the first `step`."""
        for name, theta in tensors.items():
            share = self.shares.get(name)
            if share is None or theta.grad is None:  # no gradient: frozen by the user, or not used by the model
                continue
            theta.grad.add_(theta, alpha=self.rho)
            pull = theta.new_zeros(theta.numel())
            pull[share.positions] = share.dual - share.copy
            theta.grad.add_(pull.view_as(theta), alpha=self.rho)

    def penalty(self, tensors: Mapping[str, Tensor]) -> float:
        """rho/2 |theta - theta' + u|^2 over all tensors."""
        total = 0.0
        for name, theta in tensors.items():
            if name in self.shares:
                share = self.shares[name]
                offset = theta.detach().flatten().double()
                offset.index_add_(0, share.positions, (share.dual - share.copy).double())
                total += float(offset.square().sum())
        return self.rho / 2 * total

    def copy_of(self, name: str, like: Tensor) -> Tensor:
        """theta' of one tensor, dense, in the shape of like."""
        return (
            torch.zeros_like(like)
            .flatten()
            .index_put_((self.shares[name].positions,), self.shares[name].copy)
            .view_as(like)
        )

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers, for a checkpoint."""
        return {
            "rho": self.rho,
            "primal": self.primal,
            "dual": self.dual,
            "shares": {name: [s.positions, s.copy, s.dual] for name, s in self.shares.items()},
            "centers": dict(self.centers),
        }

    def restored(self, state: Mapping[str, Any]) -> Admm:
        """This ADMM with the state of `state`."""
        shares = {name: Share(*parts) for name, parts in state["shares"].items()}
        return replace(
            self, rho=state["rho"], primal=state["primal"], dual=state["dual"], shares=shares, centers=state["centers"]
        )

    def _positions(self, name: str, flat: Tensor) -> Tensor:
        nonzero = flat != 0
        if name in self.shares:
            nonzero[self.shares[name].positions] = True
        return nonzero.nonzero()[:, 0]

    def _at(self, name: str, where: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """theta' and u at the positions (sorted, a superset of the share's)."""
        copy, dual = torch.zeros_like(flat[where]), torch.zeros_like(flat[where])
        if name in self.shares:
            share = self.shares[name]
            slot = torch.searchsorted(where, share.positions)
            copy[slot], dual[slot] = share.copy, share.dual
        return copy, dual

    def _balanced(self) -> Admm:
        """rho doubled or halved where one residual is ten times the other; the scaled dual u moves against it."""
        if not (self.primal > 0 and self.dual > 0):
            return self
        factor = 2.0 if self.primal > 10 * self.dual else 0.5 if self.dual > 10 * self.primal else 1.0
        shares = {name: replace(share, dual=share.dual / factor) for name, share in self.shares.items()}
        return replace(self, rho=self.rho * factor, shares=shares)


def _compact(share: Share, theta: Tensor) -> Share:
    """Without the positions where theta, theta' and u are all zero."""
    keep = (share.copy != 0) | (share.dual != 0) | (theta.flatten()[share.positions] != 0)
    return Share(share.positions[keep], share.copy[keep], share.dual[keep])
