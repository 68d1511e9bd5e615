"""The alternating direction method of multipliers (ADMM), which holds the parameters near a codebook.

Sources: Gui et al. 2019, algorithm 1; names and residuals as in Boyd et al. 2011, "Distributed optimization and
statistical learning via the alternating direction method of multipliers", section 3.

Legend: theta the parameters; z their quantized copy (theta' in the paper); u the scaled dual; rho the penalty. The
training loop minimizes f(theta) + rho/2 |theta - z + u|^2 under the nonzero budget; every `interval` steps
`Admm.step` updates z and u:

    z <- ZeroKmeans(theta + u)        u <- u + theta - z

The penalty acts in one of two ways. `Admm.pull` follows the optimizer's step of length lr by the proximal step

    theta <- argmin over t of |t - theta|^2 / 2 + lr rho/2 |t - z + u|^2 = (theta + lr rho (z - u)) / (1 + lr rho),

so that Adam's moments stay those of the loss (as decoupled weight decay does, Loshchilov and Hutter 2019).
`Admm.add_penalty_gradient` adds rho (theta - z + u) to the gradient, as in the paper; Adam normalizes it away.

z and u differ from zero only where theta is, or once was, nonzero: they are stored for these positions only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from atmc.compress.constraints import Codebook

IMBALANCE = 3.0  # how far the relative residuals may be apart before rho changes


@dataclass(frozen=True)
class TensorState:
    """z and u of one tensor: positions (m,) int64 in its flat form; z and u (m,) float32 at these positions."""

    positions: Tensor
    z: Tensor
    u: Tensor


@dataclass(frozen=True)
class Admm:
    """The whole state of ADMM, a value: `step` returns the next one.

    Args:
        codebook: the constraint on z.
        rho: the penalty; the paper's, for the penalty in the gradient, is 0.1.
        balance: adapt rho by balancing relative residuals (Wohlberg 2017).
        states: name -> z and u of each tensor; empty before the first step.
        centers: name -> the last codebook, from which the next quantization starts.
        primal: the primal residual |theta - z| at the last step.
        dual: the dual residual rho |z - previous z| at the last step.
        relative_primal: |theta - z| over the larger of |theta| and |z|.
        relative_dual: |z - previous z| over |u|.
    """

    codebook: Codebook
    rho: float = 0.1
    balance: bool = False
    states: Mapping[str, TensorState] = field(default_factory=dict)
    centers: Mapping[str, Tensor] = field(default_factory=dict)
    primal: float = math.nan
    dual: float = math.nan
    relative_primal: float = math.nan
    relative_dual: float = math.nan

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho > 0):
            raise ValueError(f"expected a finite rho > 0, got {self.rho}")

    @torch.no_grad()
    def step(self, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> Admm:
        """Return the state with z and u updated for the parameters as they are now (name -> theta).

        Args:
            weights: name -> weights of the squared errors of rounding, shaped like theta; 1 if missing.
        """
        positions, sums, previous, chosen = {}, {}, {}, {}
        for name, theta in tensors.items():
            flat = theta.flatten()
            positions[name] = self._support(name, flat)
            previous[name] = self._expand(name, positions[name], flat)
            sums[name] = flat[positions[name]] + previous[name].u
            if weights and name in weights:
                chosen[name] = weights[name].flatten()[positions[name]]
        z, centers = self.codebook.quantize(sums, self.centers, chosen)
        states: dict[str, TensorState] = {}
        primal = change = size = quantized_size = dual_size = 0.0
        for name, theta in tensors.items():
            gap = theta.flatten()[positions[name]] - z[name]
            u = previous[name].u + gap
            primal += _sum_of_squares(gap)
            change += _sum_of_squares(z[name] - previous[name].z)
            size, quantized_size = size + _sum_of_squares(theta), quantized_size + _sum_of_squares(z[name])
            dual_size += _sum_of_squares(u)
            states[name] = _drop_zeros(TensorState(positions[name], z[name], u), theta)
        updated = replace(
            self,
            states=states,
            centers=centers,
            primal=math.sqrt(primal),
            dual=self.rho * math.sqrt(change),
            relative_primal=math.sqrt(primal / max(size, quantized_size, 1e-300)),
            relative_dual=math.sqrt(change / max(dual_size, 1e-300)),
        )
        return updated._balance_residuals() if self.balance else updated

    @torch.no_grad()
    def add_penalty_gradient(self, tensors: Mapping[str, Tensor]) -> None:
        """Add rho (theta - z + u) to each tensor's .grad, in place; before the first `step` add nothing."""
        for name, theta in tensors.items():
            state = self.states.get(name)
            if state is None or theta.grad is None:  # no gradient: frozen by the user, or not used by the model
                continue
            theta.grad.add_(theta, alpha=self.rho)
            pull = theta.new_zeros(theta.numel())
            pull[state.positions] = state.u - state.z
            theta.grad.add_(pull.view_as(theta), alpha=self.rho)

    @torch.no_grad()
    def pull(self, tensors: Mapping[str, Tensor], step_size: float) -> None:
        """Take the proximal step of the penalty for a step of this size, in place, where theta is not zero.

        Before the first `step` nothing changes.
        """
        strength = step_size * self.rho
        for name, theta in tensors.items():
            state = self.states.get(name)
            if state is None:
                continue
            target = theta.new_zeros(theta.numel())
            target[state.positions] = state.z - state.u
            pulled = theta.add(target.view_as(theta), alpha=strength).div_(1 + strength)
            theta.copy_(torch.where(theta != 0, pulled, theta))

    def state(self) -> dict[str, Any]:
        """Return the state as plain tensors and numbers, for a checkpoint."""
        return {
            "rho": self.rho,
            "primal": self.primal,
            "dual": self.dual,
            "relative_primal": self.relative_primal,
            "relative_dual": self.relative_dual,
            "shares": {name: [s.positions, s.z, s.u] for name, s in self.states.items()},
            "centers": dict(self.centers),
        }

    def restored(self, state: Mapping[str, Any]) -> Admm:
        """Return this ADMM with a state that `state` returned, in place of its own."""
        return replace(
            self,
            rho=state["rho"],
            primal=state["primal"],
            dual=state["dual"],
            relative_primal=state["relative_primal"],
            relative_dual=state["relative_dual"],
            states={name: TensorState(*tensors) for name, tensors in state["shares"].items()},
            centers=state["centers"],
        )

    def _support(self, name: str, flat: Tensor) -> Tensor:
        """Return the sorted positions at which theta, z or u may differ from zero."""
        nonzero = flat != 0
        if name in self.states:
            nonzero[self.states[name].positions] = True
        return nonzero.nonzero()[:, 0]

    def _expand(self, name: str, positions: Tensor, flat: Tensor) -> TensorState:
        """Return z and u at these sorted positions, which contain those of the tensor's state."""
        z, u = torch.zeros_like(flat[positions]), torch.zeros_like(flat[positions])
        if name in self.states:
            state = self.states[name]
            slots = torch.searchsorted(positions, state.positions)
            z[slots], u[slots] = state.z, state.u
        return TensorState(positions, z, u)

    def _balance_residuals(self) -> Admm:
        """Double or halve rho if one relative residual is over IMBALANCE times the other; rescale u, scaled by 1 / rho.

        Absolute residuals have the units of theta and of the loss's gradient, and their ratio means nothing.
        """
        primal, dual = self.relative_primal, self.relative_dual
        if not (primal > 0 and dual > 0):
            return self
        factor = 2.0 if primal > IMBALANCE * dual else 0.5 if dual > IMBALANCE * primal else 1.0
        states = {name: replace(state, u=state.u / factor) for name, state in self.states.items()}
        return replace(self, rho=self.rho * factor, states=states)


def _sum_of_squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _drop_zeros(state: TensorState, theta: Tensor) -> TensorState:
    """Remove the positions at which theta, z and u are all zero."""
    keep = (state.z != 0) | (state.u != 0) | (theta.flatten()[state.positions] != 0)
    return TensorState(state.positions[keep], state.z[keep], state.u[keep])
