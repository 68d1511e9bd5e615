"""Linear bounds are sound for what runs in float32, whatever lines are chosen, and never looser than they should be."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import EXTREMES, chain, conv, images_of, random_graph, with_classifier
from test_attacks_exact import at_radius, exact_radius, linear_model, network
from test_verify import factors_network, points
from torch import Tensor

from atmc.deploy.engine.sparse import SparseNetwork
from atmc.deploy.graph.graph import (
    Affine,
    AvgPool,
    Conv,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Relu,
    run_graph,
)
from atmc.evaluation.verify import linear, matrices, units
from atmc.evaluation.verify import lines as lines_module
from atmc.evaluation.verify.bounds import Box, Rounding, bound_images, bound_margins
from atmc.evaluation.verify.executions import Execution, list_executions, prove_intervals
from atmc.evaluation.verify.linear import Neighborhood, Reducer, prove_linear
from atmc.evaluation.verify.lines import Level, Lines, Region, Relaxation, bound_above, optimize
from atmc.robust.threats import Linf

EXACT = Rounding(outward=False)


def dense_conv(outputs: int, inputs: int, side: int) -> Conv:
    return conv(outputs, inputs, side, side, density=1)


NETWORKS = {
    "factors": factors_network(0),
    **EXTREMES,
    "overlapping windows": with_classifier(
        chain((2, 7, 7), dense_conv(3, 2, 3), MaxPool((3, 3), (2, 2), (1, 1)), Relu(), dense_conv(2, 3, 2))
    ),
    "windows of ReLUs": with_classifier(
        chain((1, 8, 8), dense_conv(3, 1, 3), Relu(), MaxPool((2, 2), (2, 2)), dense_conv(4, 3, 2), Relu())
    ),
    "ceilings": with_classifier(chain((2, 5, 5), dense_conv(4, 2, 3), Relu(0.8), dense_conv(4, 4, 2), Relu(1.5))),
    **{f"random {seed}": random_graph(seed) for seed in range(24)},
}


def reduce(graph: Graph, x: Tensor, label: int, eps: float, rounding: Rounding | None = None) -> Neighborhood:
    """Reduce a graph around an image (1, c, h, w)."""
    around = Reducer(Execution(graph=graph, rounding=rounding or Rounding())).reduce(x[0], label, Linf(eps))
    assert around is not None
    return around


def margins_of(logits: Tensor, label: int) -> Tensor:
    """Return z_j - z_y (n, classes - 1) of the classes j other than y."""
    differences = logits.double() - logits[:, [label]].double()
    return differences[:, [j for j in range(logits.shape[1]) if j != label]]


def random_lines(level: Level, region: Region, generator: torch.Generator) -> Lines:
    """Draw lines, of which some are at the ends of what is allowed."""

    def draw(like: Tensor) -> Tensor:
        return (2 * torch.rand(like.shape, generator=generator, dtype=torch.float64) - 0.5).clamp(0, 1)

    return Lines(rise=draw(region.bottom), share=draw(region.lower), both=draw(region.bottom))


def escapes(around: Neighborhood, logits: Tensor, label: int) -> int:
    """Count the margins above the bounds of CROWN, constants, optimized lines and random ones."""
    margins, generator = margins_of(logits, label), torch.Generator().manual_seed(0)
    regions = [level.region() for level in around.levels]
    kinds = [Lines.crown, Lines.flat, Lines.mixed, Lines.blend]
    kinds += [lambda level, region: random_lines(level, region, generator)] * 4
    choices = [[kind(*both) for both in zip(around.levels, regions, strict=True)] for kind in kinds]
    bounds = [bound_above(around.levels, around.pixels, around.targets, regions, lines).values for lines in choices]
    best, _ = optimize(around.levels, around.pixels, around.targets, regions, choices[0], steps=5)
    return sum(int((margins > limit).sum()) for limit in (*bounds, best.values, around.bound(2)[0].values))


class TestSound:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_nothing_leaves_the_bounds(self, name):
        graph = NETWORKS[name]
        x = torch.from_numpy(images_of(graph, 1))
        label = int(run_graph(graph, x).argmax())
        for eps in (0.3, 0.02):
            images = points(x, eps, 150)
            around = reduce(graph, x, label, eps)
            assert escapes(around, run_graph(graph, images), label) == 0
            assert escapes(around, torch.from_numpy(SparseNetwork(graph)(images.numpy())), label) == 0

    @pytest.mark.parametrize("name", NETWORKS)
    def test_rounding_stays_within_the_error(self, name, monkeypatch):
        """The box is a single image, so that the bounds are nothing but rounding around the exact margins."""
        escaped = 0
        monkeypatch.setattr(linear, "bound_images", lambda x, threat: Box(x.double(), x.double()))
        for x in torch.from_numpy(images_of(NETWORKS[name], 3)).split(1):
            around = reduce(NETWORKS[name], x, 0, 0.1)
            escaped += escapes(around, run_graph(NETWORKS[name], x), 0)
        assert escaped == 0

    def test_without_the_margin_rounding_would_leave_the_bounds(self, monkeypatch):
        """The test above can fail."""
        escaped = 0
        monkeypatch.setattr(linear, "bound_images", lambda x, threat: Box(x.double(), x.double()))
        monkeypatch.setattr(units, "DELTA", 0.0)
        monkeypatch.setattr(lines_module, "DELTA", 0.0)
        for graph in NETWORKS.values():
            for x in torch.from_numpy(images_of(graph, 2)).split(1):
                escaped += escapes(reduce(graph, x, 0, 0.1, EXACT), run_graph(graph, x), 0)
        assert escaped > 100

    @pytest.mark.parametrize("name", ["fork", "windows of ReLUs", "overlapping windows", "ceilings"])
    def test_conditions_of_a_branch(self, name):
        """An image stays below the bounds of every branch that holds it."""
        graph, generator = NETWORKS[name], torch.Generator().manual_seed(0)
        x = torch.from_numpy(images_of(graph, 1))
        around, images = reduce(graph, x, 0, 0.3), points(x, 0.3, 60)
        margins = margins_of(run_graph(graph, images.double()), 0)
        decided = 0
        for image, margin in zip(images.double(), margins, strict=True):
            variables, regions = image.reshape(1, -1), []
            for level in around.levels:
                candidates = level.forms.run(variables)
                of_units = torch.maximum(level.largest(candidates), level.floor)
                variables = torch.cat([variables, of_units], 1)
                wins = candidates >= level.spread(of_units) - 1e-9
                keeps = torch.rand(candidates.shape, generator=generator) < 0.5
                floored = level.floor >= of_units - 1e-9
                floored |= level.floor.isfinite() & (torch.rand(floored.shape, generator=generator) < 0.5)
                region = Region.of(level, level.lower, level.upper, wins | keeps, floored)
                decided += int(((region.top - region.bottom) < (level.region().top - level.region().bottom)).sum())
                regions.append(region)
            for _ in range(3):
                chosen = [random_lines(*both, generator) for both in zip(around.levels, regions, strict=True)]
                bounds = bound_above(around.levels, around.pixels, around.targets, regions, chosen)
                assert bool((margin <= bounds.values).all())
        assert decided > 0


def narrow(field: str, amount: float) -> Callable[[Callable[..., Relaxation]], Callable[..., Relaxation]]:
    """Return a change of `Relaxation.of` that adds to one of its fields a share of the distance of top and bottom."""

    def change(of: Callable[..., Relaxation]) -> Callable[..., Relaxation]:
        def wrong(level: Level, region: Region, line: Lines, c: Tensor, scale: Tensor) -> Relaxation:
            right = of(level, region, line, c, scale)
            moved = getattr(right, field) + amount * (region.top - region.bottom)
            return replace(right, **{field: moved})

        return wrong

    return change


class TestSeen:
    """What would be wrong is seen by the tests above."""

    def count_escapes(self, names: Sequence[str]) -> int:
        escaped = 0
        for name in names:
            graph = NETWORKS[name]
            x = torch.from_numpy(images_of(graph, 1))
            label = int(run_graph(graph, x).argmax())
            around = reduce(graph, x, label, 0.3)
            escaped += escapes(around, run_graph(graph, points(x, 0.3, 300)), label)
        return escaped

    @pytest.mark.parametrize(("field", "amount"), [("height", -0.4), ("base", 0.4)])
    def test_a_wrong_relaxation(self, field, amount, monkeypatch):
        monkeypatch.setattr(Relaxation, "of", narrow(field, amount)(Relaxation.of))
        assert self.count_escapes(["fork", "ceilings", "windows of ReLUs"]) > 0

    @pytest.mark.parametrize("kind", [Conv, Linear, Affine, AvgPool, GlobalAvgPool])
    def test_a_wrong_matrix(self, kind, monkeypatch):
        def wrong(op, before, after):
            matrix, offset = matrices.build_affine(op, before, after)
            return (0.7 * matrix, offset) if isinstance(op, kind) else (matrix, offset)

        monkeypatch.setattr(linear, "build_affine", wrong)
        assert self.count_escapes([f"random {seed}" for seed in range(24)]) > 0

    def test_a_window_of_one_pixel(self, monkeypatch):
        windows = linear.list_windows
        monkeypatch.setattr(linear, "list_windows", lambda *args: windows(*args)[-1:])
        assert self.count_escapes(["windows of ReLUs", "overlapping windows"]) > 0


class TestTight:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_optimized_bounds_are_no_looser_than_crown_and_intervals(self, name):
        graph = NETWORKS[name]
        x = torch.from_numpy(images_of(graph, 1))
        around = reduce(graph, x, 0, 0.05)
        regions = [level.region() for level in around.levels]
        crown = [Lines.crown(*both) for both in zip(around.levels, regions, strict=True)]
        first = bound_above(around.levels, around.pixels, around.targets, regions, crown).values
        intervals = bound_margins(graph, bound_images(x, Linf(0.05)), torch.tensor([0]))[0, 1:]
        plain, optimized = (around.bound(steps)[0].values for steps in (0, 10))
        assert bool((plain <= torch.minimum(first, intervals)).all())
        assert bool((optimized <= plain).all())

    def test_a_stable_network_is_affine(self):
        """z_1 - z_0 = relu(x + 0.6 - y) - relu(x) - 0.25 for x, y in [0.25, 0.75]: both ReLUs pass, it is 0.35 - y."""
        first = Linear(np.array([[1, -1], [1, 0]], np.float32), np.array([0.6, 0], np.float32))
        last = Linear(np.array([[0, 0], [1, -1]], np.float32), np.array([0, -0.25], np.float32))
        graph = chain((1, 1, 2), Flatten(), first, Relu(), last)
        around = reduce(graph, torch.full((1, 1, 1, 2), 0.5), 0, 0.25)
        assert around.units == 0
        assert float(around.bound(0)[0].values) == pytest.approx(0.1, abs=1e-4)
        assert float(around.limits) == pytest.approx(0.6, abs=1e-4)

    def test_crown_of_one_open_relu(self):
        """z_1 - z_0 = relu(x - y) - x for x, y in [0.25, 0.75]: d is in [-0.5, 0.5], and relu(d) <= (d + 0.5) / 2."""
        first = Linear(np.array([[1, -1], [1, 0]], np.float32), np.zeros(2, np.float32))
        last = Linear(np.array([[0, 1], [1, 0]], np.float32), np.zeros(2, np.float32))
        graph = chain((1, 1, 2), Flatten(), first, Relu(), last)
        around = reduce(graph, torch.full((1, 1, 1, 2), 0.5), 0, 0.25)
        assert around.units == 1
        regions = [level.region() for level in around.levels]
        crown = [Lines.crown(*both) for both in zip(around.levels, regions, strict=True)]
        bounds = bound_above(around.levels, around.pixels, around.targets, regions, crown)
        # (x - y + 0.5) / 2 - x is largest at x = y = 0.25
        assert float(bounds.values) == pytest.approx(0.0, abs=1e-4)
        assert bounds.pixels[0].tolist() == pytest.approx([-0.5, -0.5], abs=1e-4)

    @pytest.mark.parametrize("classes", [2, 5])
    def test_linear_models_are_proved_up_to_the_exact_radius(self, classes):
        model = linear_model(classes, side=6)
        images = at_radius(model, "linf", 0.004, n=4, side=6)
        (execution, *_) = list_executions(model, (1, 6, 6))
        assert bool(prove_linear(execution, images.pixels, images.labels, Linf(0.998 * 0.004)).all())
        assert not bool(prove_linear(execution, images.pixels, images.labels, Linf(1.0001 * 0.004)).any())

    def test_no_proof_beyond_the_exact_radius_of_a_relu_network(self):
        model = network()
        x = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            y = model(x).argmax(1)
        (execution, *_), proved = list_executions(model, (1, 2, 2)), {"linear": 0, "interval": 0}
        for image, label in zip(x[:, None], y[:, None], strict=True):
            radius = exact_radius(model, image.flatten().double().numpy(), int(label), "linf")
            for share in (0.6, 0.9, 0.99):
                if share * radius < 1:
                    proved["linear"] += int(prove_linear(execution, image, label, Linf(share * radius)))
                    proved["interval"] += int(prove_intervals(execution, image, label, Linf(share * radius)))
            if radius < 0.99:
                for share in (1.0, 1.01):
                    assert not bool(prove_linear(execution, image, label, Linf(share * radius)))
        assert proved["linear"] > proved["interval"] > 0

    def test_maxima_that_rounding_alone_leaves_open_are_no_units(self):
        """Windows of a channel without weights are of four equal values, each with its own rounding."""
        weight = np.array([1.0, 0.0], np.float32).reshape(2, 1, 1, 1)
        first = Conv(weight, np.full(2, 0.3, np.float32))
        last = Linear(np.array([[1, 1], [-1, -1]], np.float32), np.zeros(2, np.float32))
        graph = chain((1, 2, 2), first, MaxPool((2, 2), (2, 2)), Relu(), Flatten(), last)
        x = torch.tensor([0.5, 0.4, 0.3, 0.45]).view(1, 1, 2, 2)
        around = reduce(graph, x, 0, 0.1)
        assert around.units == 1
        # -2 (max(x) + 0.3 + 0.3), and max(x) >= 0.4
        assert float(around.bound(10)[0].values) == pytest.approx(-2.0, abs=1e-3)


class TestNothingKnown:
    def test_a_tie_of_rounding_is_not_proved(self):
        weight = np.array([[1.0, 2.0**-30], [1.0, 0.0]], np.float32)
        graph = chain((1, 1, 2), Flatten(), Linear(weight, np.zeros(2, np.float32)))
        execution = Execution(graph=graph, rounding=Rounding())
        assert not bool(prove_linear(execution, torch.ones(1, 1, 1, 2), torch.tensor([0]), Linf(1e-9)))

    def test_overflow_is_not_proved(self):
        large = np.full((2, 4), 3e38, np.float32)
        last = Linear(np.array([[1.0, 0.0], [0.0, -1.0]], np.float32), np.zeros(2, np.float32))
        graph = chain((1, 2, 2), Flatten(), Linear(large, np.zeros(2, np.float32)), Relu(6.0), last)
        for rounding, proved in ((EXACT, True), (Rounding(), False)):
            execution = Execution(graph=graph, rounding=rounding)
            assert bool(prove_linear(execution, torch.ones(1, 1, 2, 2), torch.tensor([0]), Linf(1e-6))) == proved

    def test_a_network_of_too_many_units_is_not_proved(self, monkeypatch):
        graph = NETWORKS["windows of ReLUs"]
        x = torch.from_numpy(images_of(graph, 1))
        execution = Execution(graph=graph, rounding=Rounding())
        label = run_graph(graph, x).argmax(1)
        assert bool(prove_linear(execution, x, label, Linf(1e-4)))
        monkeypatch.setattr(linear, "MOST_UNITS", 3)
        assert not bool(prove_linear(execution, x, label, Linf(0.3)))
