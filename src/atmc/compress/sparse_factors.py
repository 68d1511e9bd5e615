"""Split a matrix into sparse rank-one terms and a sparse rest, at a price per nonzero: where U, V and C may start.

Legend: M the matrix (out, columns); R = M - U V what the terms leave; price the squared error that a nonzero is worth.
An entry of R either costs its square, as an error, or the price, as a nonzero of C: phi(e) = min(e^2, price). The
decomposition lowers

    J(U, V) = sum over entries of phi(R) + price * (nonzeros of U + nonzeros of V)

by one term u v^T after the other, as long as J falls: a term with a rows and b columns pays for a + b nonzeros and may
save up to a * b of them. Source of the idea: the truncated power method for sparse singular vectors (Yuan and Zhang
2013), here with the robust error phi, which an entry outside the term cannot distort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atmc.compress.factorize import compressible_weights, is_factorized, set_initial_factors
from atmc.compress.projections import keep_largest

STARTS = 8  # rows from which the search for a term starts, beside the leading singular vector
SWEEPS = 12  # at most so many updates of u and v per start
FITS = 4  # reweighted least squares per update
MOST_TERMS = 32  # per weight


@torch.no_grad()
def factorize_if_it_pays(
    model: nn.Module, nonzeros: int, *, profit: float = 1.0, exclude: Sequence[str] = ()
) -> dict[str, int]:
    """Hold the weights as W = U V + C that sparse rank-one terms make cheaper, in place; the others stay plain.

    The price of a nonzero is the square of the smallest of the `nonzeros` largest entries over all weights, which is
    what the marginal one saves. C starts at W - U V, so that W stays the same.

    Args:
        nonzeros: the budget over all weights.
        profit: a term must save this times the nonzeros that it takes, beyond what it takes.
        exclude: shell patterns over paths of weights that stay plain.

    Returns:
        path -> number of terms, for each weight that was factorized.
    """
    weights = [weight for weight in compressible_weights(model, exclude=exclude) if not is_factorized(weight)]
    kept = [value[value != 0].abs() for value in keep_largest([weight.tensor for weight in weights], nonzeros)]
    smallest = [float(value.min()) for value in kept if len(value)]
    terms: dict[str, int] = {}
    if not smallest:
        return terms
    price = min(smallest) ** 2
    for site in weights:
        if not site.factorable:
            continue
        matrix = site.tensor.detach().flatten(1)
        found = sparse_terms(matrix, price, most=MOST_TERMS, profit=profit)
        if found.gains:
            rest = (matrix.double() - found.u.double() @ found.v.double()).to(matrix)
            set_initial_factors(site, found.u, found.v, rest.view(site.tensor.shape))
            terms[site.path] = len(found.gains)
    return terms


@dataclass(frozen=True)
class SparseTerms:
    """U (out, terms), V (terms, columns) with balanced sizes, and the gains in J of the terms, in their order."""

    u: Tensor
    v: Tensor
    gains: list[float]


@torch.no_grad()
def sparse_terms(matrix: Tensor, price: float, *, most: int | None = None, profit: float = 0.0) -> SparseTerms:
    """Return the sparse rank-one terms that lower J, found greedily; none if no term pays.

    Args:
        matrix: M (out, columns), finite.
        price: squared error per nonzero, above 0.
        most: largest number of terms; min(out, columns) by default.
        profit: by how much a term must lower J, in parts of the price of its own nonzeros.

    >>> matrix = torch.outer(torch.tensor([1.0, 2.0, 0.0, 1.0]), torch.tensor([3.0, 0.0, 3.0, 3.0, 3.0]))
    >>> terms = sparse_terms(matrix, 0.01)
    >>> len(terms.gains), torch.allclose(terms.u @ terms.v, matrix)
    (1, True)

    Raises:
        ValueError: the price is not above 0.
    """
    if not price > 0:
        raise ValueError(f"expected a price above 0, got {price}")
    rest = matrix.detach().double().clone()
    columns_of_u: list[Tensor] = []
    rows_of_v: list[Tensor] = []
    gains: list[float] = []
    for _ in range(min(matrix.shape) if most is None else most):
        term = _best_term(rest, price)
        if term is None:
            break
        u, v, gain = term
        if gain <= profit * price * int(u.count_nonzero() + v.count_nonzero()):
            break
        rest -= torch.outer(u, v)
        balance = (v.norm() / u.norm()).sqrt()
        columns_of_u.append(u * balance)
        rows_of_v.append(v / balance)
        gains.append(gain)
    out, columns = matrix.shape
    u = torch.stack(columns_of_u, 1) if gains else rest.new_zeros(out, 0)
    v = torch.stack(rows_of_v) if gains else rest.new_zeros(0, columns)
    return SparseTerms(u.to(matrix.dtype), v.to(matrix.dtype), gains)


def _best_term(rest: Tensor, price: float) -> tuple[Tensor, Tensor, float] | None:
    """Return u, v and the gain in J of the best term that was found, or None if none pays."""
    best: tuple[Tensor, Tensor, float] | None = None
    for start in _starts(rest, price):
        v, gain = start, 0.0
        for _ in range(SWEEPS):
            u, _ = _fit(rest, v, price)
            if not u.any():
                break
            v, saved = _fit(rest.T, u, price)
            total = saved - price * int(u.count_nonzero())
            if not v.any() or total <= gain * (1 + 1e-6):
                break
            gain = total
            if best is None or gain > best[2]:
                best = u, v, gain
    return best


def _starts(rest: Tensor, price: float) -> list[Tensor]:
    """Return vectors (columns,) to start from: the leading singular vector, and the rows that would save the most."""
    capped = rest.square().clamp_max(price).sum(1)
    rows = capped.topk(min(STARTS, len(rest))).indices
    starts = [torch.where(row.square() > price, row, 0.0) for row in rest[rows]]
    v = rest[rows[0]]
    for _ in range(10):
        v = rest.T @ (rest @ v)
        v = v / v.norm().clamp_min(1e-300)
    return [start for start in (v, *starts) if start.any()]


def _fit(rest: Tensor, v: Tensor, price: float) -> tuple[Tensor, float]:
    """Return the best factor u (rows,) of R ~ u v^T for a given v, and the sum of what its nonzeros save.

    Every entry of u solves min over u_i of sum over j of phi(R_ij - u_i v_j), by least squares over the entries that
    lie within the price of the fit; it stays 0 if it saves less than the price of a nonzero.
    """
    support = v.nonzero()[:, 0]
    block, v = rest[:, support], v[support]
    before = block.square().clamp_max(price)
    best, saved = rest.new_zeros(len(rest)), rest.new_zeros(len(rest))
    for first in (_least_squares(block, v, torch.ones_like(block)), _median(block, v)):
        u = first
        for _ in range(FITS):
            error = (block - u[:, None] * v).square()
            gain = (before - error.clamp_max(price)).sum(1) - price
            better = gain > saved
            best, saved = torch.where(better, u, best), torch.where(better, gain, saved)
            u = _least_squares(block, v, (error < price).double())
    return best, float(saved.sum())


def _least_squares(block: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """Return for each row the u that minimizes sum over j of weight_j (row_j - u v_j)^2."""
    return (weight * block) @ v / (weight @ v.square()).clamp_min(1e-300)


def _median(block: Tensor, v: Tensor) -> Tensor:
    """Return for each row the median of row_j / v_j."""
    return (block / v).median(1).values
