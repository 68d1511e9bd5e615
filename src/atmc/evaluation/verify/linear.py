"""Proofs by backward linear bounds: a network is reduced to units around each image, and its margins are bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from atmc.deploy.graph.graph import Add, Flatten, MaxPool, Relu
from atmc.evaluation.verify.bounds import MOST, Box, bound_images, bound_margins, bound_values
from atmc.evaluation.verify.executions import Execution
from atmc.evaluation.verify.lines import Bounds, Forms, Level, Lines, Pixels, Region, bound_above, keep_better, optimize
from atmc.evaluation.verify.matrices import Array, Indices, Matrix, build_affine, list_windows
from atmc.evaluation.verify.units import DELTA, Mask, Rows, stack
from atmc.robust.threats import Threat

MOST_UNITS = 2**13  # around one image; a network with more is left to the interval bounds
CHUNK = 2**22  # coefficients that a backward pass handles at once


@dataclass(frozen=True, eq=False, kw_only=True)
class Neighborhood:
    """A network on the images of a threat around one image, in terms of pixels and units.

    Args:
        pixels: lower and upper bounds (pixels,).
        levels: the units, from the first level to the last.
        targets: the margins z_j - z_y (classes - 1,) of the classes j other than y.
        limits: (classes - 1,) their upper bounds by intervals.
    """

    pixels: Pixels
    levels: tuple[Level, ...]
    targets: Forms
    limits: Tensor

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(level.units for level in self.levels)

    def bound(self, steps: int) -> tuple[Bounds, list[Lines]]:
        """Return upper bounds of the margins, at most `limits`, and the lines that gave them.

        The first lines are the best of CROWN's, constants, and a mixture of both by level. The optimization starts from
        them, and once more from a blend.

        Args:
            steps: of the optimization; 0 for none.
        """
        regions = [level.region() for level in self.levels]

        def descend(start: Sequence[Lines], steps: int) -> tuple[Bounds, list[Lines]]:
            return optimize(self.levels, self.pixels, self.targets, regions, start, steps=steps)

        def choose(kind: Callable[[Level, Region], Lines]) -> list[Lines]:
            return [kind(*both) for both in zip(self.levels, regions, strict=True)]

        bounds, lines = descend(choose(Lines.crown), 0)
        for kind in (Lines.flat, Lines.mixed):
            bounds, lines = keep_better(bounds, lines, *descend(choose(kind), 0))
        for start in (lines, choose(Lines.blend)):
            if steps and bool((torch.fmin(bounds.values, self.limits) >= 0).any()):
                bounds, lines = keep_better(bounds, lines, *descend(start, steps))
        return replace(bounds, values=torch.fmin(bounds.values, self.limits)), lines


class Reducer:
    """Reduces the network of an execution to pixels and units, around one image after the other."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        shapes = execution.graph.shapes()
        self.maps: dict[int, tuple[Matrix, Array]] = {}
        self.windows: dict[int, Indices] = {}
        for index, node in enumerate(execution.graph.nodes):
            before, after = shapes[node.inputs[0]], shapes[index + 1]
            if isinstance(node.op, MaxPool):
                self.windows[index] = list_windows(node.op, before, after)
            elif not isinstance(node.op, Add | Flatten | Relu):
                self.maps[index] = build_affine(node.op, before, after)

    def reduce(self, x: Tensor, label: int, threat: Threat) -> Neighborhood | None:
        """Return the network around an image x (c, h, w); None if it has too many units or values that may overflow.

        Raises:
            ValueError: as `bound_images`.
        """
        graph, rounding = self.execution.graph, self.execution.rounding
        images, labels = bound_images(x[None], threat), torch.tensor([label])
        boxes = bound_values(graph, images, rounding)
        if not all(bool((box.lower.isfinite() & box.upper.isfinite()).all()) for box in boxes):
            return None
        limits = bound_margins(graph, images, labels, rounding)[0]
        lower, upper = (values.flatten() for values in (images.lower, images.upper))
        try:
            expansion = _Expansion(lower, upper)
            values: list[_Value] = [_Value((Rows.of_pixels(lower.numpy(), upper.numpy(), expansion.variables),))]
            for index, box in enumerate(boxes[1:]):
                values.append(self._expand(index, values, expansion, box))
            logits = expansion.evaluate(values[-1])
        except _TooManyUnits:
            return None
        others = np.delete(np.arange(len(limits)), label)
        margins = logits[others].plus(logits[np.full(len(others), label)], -1)
        return Neighborhood(
            pixels=(lower, upper),
            levels=tuple(expansion.levels),
            targets=Forms.of(margins, expansion.used, dense=True),
            limits=limits[others],
        )

    def _expand(self, index: int, values: Sequence[_Value], expansion: _Expansion, box: Box) -> _Value:
        """Return the output of a node.

        Args:
            values: the earlier values.
            box: of the output.
        """
        node = self.execution.graph.nodes[index]
        op, value = node.op, values[node.inputs[0]]
        lower, upper = (bound.numpy().reshape(-1) for bound in (box.lower, box.upper))
        margin = np.broadcast_to(np.asarray(box.margin), box.lower.shape).reshape(-1)
        match op:
            case Flatten():
                return value
            case MaxPool():
                windows = self.windows[index]
                candidates = tuple(rows.take(window) for rows in value.candidates for window in windows)
                return _Value(candidates, value.floor)
            case Relu(ceiling):
                positive = _Value(value.candidates, max(value.floor, 0.0))
                if ceiling is None:
                    return positive
                rows = expansion.evaluate(positive)  # min(x, ceiling) = -max(-x, -ceiling)
                rows = expansion.evaluate(_Value((rows.negate(),), -float(ceiling))).negate()
                rows = replace(rows, error=rows.error + margin)
            case Add():
                one, two = (expansion.evaluate(values[value]) for value in node.inputs)
                rows = one.plus(two, margin=margin)
            case _:
                rows = expansion.evaluate(value).apply(*self.maps[index], margin)
        return _Value((rows.within(lower, upper),))


class _Value:
    """The maximum of a floor and of candidates; most values have one candidate and no floor."""

    def __init__(self, candidates: tuple[Rows, ...], floor: float = -np.inf) -> None:
        self.candidates = candidates
        self.floor = floor


class _TooManyUnits(Exception):
    """There are more units than `MOST_UNITS`."""


class _Expansion:
    """The units that were made so far around one image."""

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        self.pixels = lower, upper
        self.levels: list[Level] = []
        self.used = len(lower)  # variables so far
        self.variables = self.used + MOST_UNITS
        if self.variables >= MOST:
            raise _TooManyUnits

    def evaluate(self, value: _Value) -> Rows:
        """Return a value as affine forms, of new units for the maxima that are open."""
        if len(value.candidates) > 1 or value.floor > -np.inf:
            value.candidates, value.floor = (self._unite(value.candidates, value.floor),), -np.inf
        return value.candidates[0]

    def _unite(self, candidates: Sequence[Rows], floor: float) -> Rows:
        rows, shape = stack(candidates), (len(candidates), len(candidates[0].offset))
        alive, floored = _find_alive(rows, shape, floor)
        wanted = (alive & (alive.sum(0) + floored > 1)).reshape(-1).nonzero()[0]
        if len(wanted):
            lower, upper = self._tighten(rows[wanted])
            rows.lower[wanted], rows.upper[wanted] = lower, upper
            alive, floored = _find_alive(rows, shape, floor)
        is_open = alive.sum(0) + floored > 1
        lower, upper = (np.maximum(bounds.reshape(shape).max(0), floor) for bounds in (rows.lower, rows.upper))
        # A maximum that is open for its rounding alone, as in channels without weights, is a constant with an error.
        rounded = is_open & (upper - lower <= 4 * np.where(alive, rows.error.reshape(shape), 0.0).max(0))
        is_open &= ~rounded
        count = int(is_open.sum())
        if self.used + count > self.variables:
            raise _TooManyUnits
        copied = (alive & ~is_open & ~rounded).nonzero()
        ones = np.ones(len(copied[0]))
        selection = sparse.coo_array(
            (ones, (copied[1], copied[0] * shape[1] + copied[1])), shape=(shape[1], rows.matrix.shape[0])
        ).tocsr()
        columns = np.arange(self.used, self.used + count)
        units = sparse.coo_array((np.ones(count), (is_open.nonzero()[0], columns)), shape=(shape[1], self.variables))
        largest = np.maximum(np.abs(lower), np.abs(upper))
        constant = np.where(rounded, (lower + upper) / 2, np.where(floored & ~is_open, floor, 0.0))
        error = np.where(rounded, (upper - lower) / 2 + DELTA * largest, 0.0)
        extent = np.where(is_open | rounded, largest, np.abs(constant))
        if count:
            unit, candidate = alive[:, is_open].T.nonzero()
            chosen = rows[candidate * shape[1] + is_open.nonzero()[0][unit]]
            floors = np.where(floored[is_open], floor, -np.inf)
            self._add_level(chosen, unit, floors)
        return Rows(
            matrix=selection @ rows.matrix + units.tocsr(),
            offset=selection @ rows.offset + constant,
            error=selection @ rows.error + error,
            terms=selection @ rows.terms + extent,
            lower=lower,
            upper=upper,
        )

    def _add_level(self, candidates: Rows, unit: Indices, floor: Array) -> None:
        level = Level(
            first=self.used,
            forms=Forms.of(candidates, self.used),
            unit=torch.from_numpy(unit),
            lower=torch.from_numpy(candidates.lower)[None],
            upper=torch.from_numpy(candidates.upper)[None],
            floor=torch.from_numpy(floor),
        )
        self.levels.append(level)
        self.used += level.units

    @torch.no_grad()
    def _tighten(self, rows: Rows) -> tuple[Array, Array]:
        """Return bounds of rows: their own, intersected with backward linear bounds."""
        regions = [level.region() for level in self.levels]
        kinds = [Lines.crown] if all(level.is_single for level in self.levels) else [Lines.crown, Lines.mixed]
        choices = [[kind(*both) for both in zip(self.levels, regions, strict=True)] for kind in kinds]
        lower, upper = rows.lower.copy(), rows.upper.copy()
        size = max(1, CHUNK // self.used)
        for start in range(0, len(lower), size):
            part = np.arange(len(lower))[start : start + size]
            targets = Forms.of(rows[part], self.used, dense=True)
            for lines in choices:
                above = bound_above(self.levels, self.pixels, targets, regions, lines).values.numpy()
                below = bound_above(self.levels, self.pixels, targets.negate(), regions, lines).values.numpy()
                lower[part], upper[part] = np.fmax(lower[part], -below), np.fmin(upper[part], above)
        return lower, upper


def _find_alive(rows: Rows, shape: tuple[int, int], floor: float) -> tuple[Mask, Mask]:
    """Return which candidates (k, n), and which floors (n,), may be the maximum."""
    lower, upper = rows.lower.reshape(shape), rows.upper.reshape(shape)
    best = lower.max(0)
    floored = floor > best
    alive = upper > np.maximum(best, floor)
    leader = lower.argmax(0)
    alive[leader[~floored], np.arange(shape[1])[~floored]] = True
    return alive, floored


def prove_linear(execution: Execution, x: Tensor, labels: Tensor, threat: Threat, *, steps: int = 20) -> Tensor:
    """Return (n,) bool: whether linear bounds prove each image x (n, c, h, w) for one execution.

    Args:
        steps: of the optimization of the lines; 0 for CROWN.

    Raises:
        ValueError: as `bound_images`.
    """
    reducer, proved = Reducer(execution), []
    for image, label in zip(x, labels.tolist(), strict=True):
        around = reducer.reduce(image, label, threat)
        proved.append(around is not None and bool((around.bound(steps)[0].values < 0).all()))
    return torch.tensor(proved, dtype=torch.bool)
