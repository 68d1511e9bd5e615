"""The complete method equals enumeration on small networks, and its bounds are sound whatever the solver says."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from networks import chain, floats, images_of
from scipy.optimize import linprog
from test_attacks_exact import at_radius, exact_radius, linear_model, network
from torch import Tensor, nn

from atmc.deploy.graph.graph import Conv, Flatten, Graph, Linear, MaxPool, Relu, run_graph
from atmc.evaluation.verify import complete, linear_program
from atmc.evaluation.verify.bounds import Rounding
from atmc.evaluation.verify.complete import decide
from atmc.evaluation.verify.executions import Execution, list_executions
from atmc.evaluation.verify.linear import Reducer, prove_linear
from atmc.evaluation.verify.lines import Lines
from atmc.robust.threats import Linf


class OfGraph(nn.Module):
    """The module of a graph."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        return run_graph(self.graph, x)


def scaled(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return floats(rng, *shape) / np.sqrt(np.prod(shape[1:]), dtype=np.float32)


def small_networks(seed: int) -> dict[str, Graph]:
    """Draw networks with few enough activation patterns to enumerate them."""
    rng = np.random.default_rng(seed)

    def linear(outputs: int, inputs: int) -> Linear:
        return Linear(scaled(rng, outputs, inputs), 0.3 * floats(rng, outputs))

    def conv(outputs: int, inputs: int, *kernel: int) -> Conv:
        return Conv(scaled(rng, outputs, inputs, *kernel), 0.3 * floats(rng, outputs))

    return {
        "ReLU": chain((1, 2, 2), Flatten(), linear(6, 4), Relu(), linear(3, 6)),
        "two layers": chain((1, 2, 2), Flatten(), linear(3, 4), Relu(), linear(3, 3), Relu(), linear(3, 3)),
        "max pooling": chain((1, 2, 4), conv(2, 1, 1, 1), MaxPool((2, 2), (2, 2)), Flatten(), linear(2, 4)),
        "max pooling, then ReLU": chain(
            (1, 3, 3), conv(2, 1, 2, 2), MaxPool((2, 2), (1, 1)), Relu(), Flatten(), linear(3, 2)
        ),
        "ReLU6": chain((1, 2, 2), Flatten(), linear(4, 4), Relu(0.4), linear(3, 4)),
    }


DEEP = [(2, 0.1555), (6, 0.0923), (7, 0.2293)]  # seeds, and radii to within 0.5 %


def deep_network(seed: int, width: int = 12) -> Graph:
    """Draw a network of three layers of ReLUs that needs branches."""
    rng = np.random.default_rng(seed)
    layers = [Linear(1.5 * scaled(rng, width, size), 0.2 * floats(rng, width)) for size in (4, width, width)]
    hidden = (op for layer in layers for op in (layer, Relu()))
    return chain((1, 2, 2), Flatten(), *hidden, Linear(scaled(rng, 3, width), np.zeros(3, np.float32)))


def list_choices(op: MaxPool | Relu, shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield affine outputs (matrix, offset) of an operation, and rows of (matrix, offset) that are >= 0 for them."""
    size = int(np.prod(shape))
    eye = np.eye(size)
    if isinstance(op, Relu):
        outputs = [[(eye[i], 0.0), (0 * eye[i], 0.0)] for i in range(size)]
        if op.ceiling is not None:
            outputs = [[*one, (0 * eye[i], op.ceiling)] for i, one in enumerate(outputs)]
    else:
        index = torch.arange(1.0, size + 1).view(1, *shape)
        unfolded = torch.nn.functional.unfold(index.transpose(0, 1), op.kernel, stride=op.stride)  # no padding
        windows = unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1]).long() - 1
        outputs = [[(eye[i], 0.0) for i in window] for window in windows.tolist()]
    for picks in itertools.product(*(range(len(one)) for one in outputs)):
        chosen = [one[pick] for one, pick in zip(outputs, picks, strict=True)]
        conditions = []
        for i, (one, pick) in enumerate(zip(outputs, picks, strict=True)):
            if isinstance(op, Relu):
                top = op.ceiling if op.ceiling is not None else np.inf
                conditions += [(eye[i], 0.0), (-eye[i], top)] if pick == 0 else []
                conditions += [(-eye[i], 0.0)] if pick == 1 else [(eye[i], -op.ceiling)] if pick == 2 else []
            else:
                conditions += [(one[pick][0] - other[0], 0.0) for other in one]
        conditions = [condition for condition in conditions if np.isfinite(condition[1])]
        yield (
            np.array([row for row, _ in chosen]),
            np.array([offset for _, offset in chosen]),
            np.array([np.append(row, offset) for row, offset in conditions]),
        )


def enumerate_margin(graph: Graph, x: np.ndarray, label: int, eps: float) -> float:
    """Return the largest z_j - z_y over the box, by a linear program for each activation pattern."""
    box = np.stack([(x - eps).clip(0, 1).ravel(), (x + eps).clip(0, 1).ravel()], 1)
    shapes, best = graph.shapes(), -np.inf

    def visit(index: int, matrix: np.ndarray, offset: np.ndarray, rows: list[np.ndarray]) -> None:
        nonlocal best
        limits = np.concatenate(rows) if rows else np.zeros((0, x.size + 1))
        if index == len(graph.nodes):
            for j in set(range(len(offset))) - {label}:
                row, constant = matrix[j] - matrix[label], offset[j] - offset[label]
                result = linprog(-row, A_ub=-limits[:, :-1], b_ub=limits[:, -1], bounds=box)
                best = max(best, constant - result.fun) if result.status == 0 else best
            return
        op = graph.nodes[index].op
        if isinstance(op, Relu | MaxPool):
            if rows and linprog(0 * x.ravel(), A_ub=-limits[:, :-1], b_ub=limits[:, -1], bounds=box).status != 0:
                return
            for outputs, constants, conditions in list_choices(op, shapes[index]):
                met = np.column_stack([conditions[:, :-1] @ matrix, conditions[:, :-1] @ offset + conditions[:, -1]])
                visit(index + 1, outputs @ matrix, outputs @ offset + constants, [*rows, met])
            return
        single = Graph(graph.input_shape, (replace(graph.nodes[index], inputs=(0,)),))
        basis = torch.from_numpy(np.column_stack([matrix, offset]).T).reshape(-1, *shapes[index])
        zero = run_graph(single, torch.zeros_like(basis[:1])).reshape(-1)
        images = run_graph(single, basis).reshape(len(basis), -1).T - zero[:, None]
        visit(index + 1, images[:, :-1].numpy(), (images[:, -1] + zero).numpy(), rows)

    visit(0, np.eye(x.size), np.zeros(x.size), [])
    return best


class TestExact:
    @pytest.mark.parametrize("name", small_networks(0))
    @pytest.mark.parametrize("seed", [0, 1])
    def test_it_equals_enumeration(self, name, seed):
        graph = small_networks(seed)[name]
        model = OfGraph(graph)
        executions = [Execution(graph=graph, rounding=Rounding())]
        x = torch.from_numpy(images_of(graph, 1, seed))[0]
        label = int(run_graph(graph, x[None]).argmax())
        verdicts = []
        for eps in (0.03, 0.1, 0.3):
            margin = enumerate_margin(graph, x.double().numpy(), label, eps)
            if abs(margin) < 1e-3:
                continue
            outcome = decide(model, executions, x, label, Linf(eps), seconds=30)
            assert outcome.verdict == ("certified" if margin < 0 else "broken")
            verdicts.append(outcome.verdict)
            if outcome.verdict == "broken":
                assert float((outcome.image - x).abs().max()) <= eps * (1 + 1e-4)
                assert 0 <= float(outcome.image.min()) <= float(outcome.image.max()) <= 1
                assert int(model(outcome.image[None]).argmax()) != label
            else:
                assert outcome.image is None
        assert verdicts

    def test_it_decides_up_to_the_exact_radius_of_a_relu_network(self):
        model = network()
        x = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        executions = list_executions(model, (1, 2, 2))
        with torch.no_grad():
            labels = model(x).argmax(1).tolist()
        for image, label in zip(x, labels, strict=True):
            radius = exact_radius(model, image.flatten().double().numpy(), label, "linf")
            for share, verdict in ((0.99, "certified"), (1.01, "broken")):
                if share * radius < 1:
                    outcome = decide(model, executions, image, label, Linf(share * radius), seconds=30)
                    assert outcome.verdict == verdict

    def test_linear_models(self):
        model = linear_model(5, side=6)
        images = at_radius(model, "linf", 0.004, n=1, side=6)
        executions = list_executions(model, (1, 6, 6))
        for share, verdict in ((0.998, "certified"), (1.002, "broken")):
            outcome = decide(model, executions, images.pixels[0], 0, Linf(share * 0.004), seconds=30)
            assert outcome.verdict == verdict
            assert outcome.unstable == 0

    @pytest.mark.parametrize(("seed", "eps"), DEEP)
    def test_deep_networks_near_their_radius(self, seed, eps):
        """It proves an image by branches; 2 % further it finds one that breaks it."""
        graph = deep_network(seed)
        x, label, executions = problem(graph, seed)
        outcome = decide(OfGraph(graph), executions, x, label, Linf(0.99 * eps), seconds=30)
        assert outcome.verdict == "certified"
        assert outcome.branches > 5
        assert not bool(prove_linear(executions[0], x[None], torch.tensor([label]), Linf(0.99 * eps)))
        assert decide(OfGraph(graph), executions, x, label, Linf(1.01 * eps), seconds=30).verdict == "broken"


def problem(graph: Graph, seed: int = 0) -> tuple[Tensor, int, list[Execution]]:
    """Return an image, its label by the graph, and the graph as an execution."""
    x = torch.from_numpy(images_of(graph, 1, seed))[0]
    return x, int(run_graph(graph, x[None]).argmax()), [Execution(graph=graph, rounding=Rounding())]


class TestTrust:
    """No proof rests on the solver, on what chooses branches, or on one execution."""

    @pytest.mark.parametrize(("seed", "eps"), DEEP)
    @pytest.mark.parametrize("solver", ["right", "random"])
    def test_bounds_alone_prove_nothing_beyond_the_radius(self, seed, eps, solver, monkeypatch):
        """No image that breaks the model is looked for, and random lines may stand in place of the solver's."""
        generator = torch.Generator().manual_seed(0)

        def draw(self, target, regions, seconds):
            lines = []
            for region in regions:
                rise, share, both = (
                    torch.rand(like.shape, generator=generator).double()
                    for like in (region.bottom, region.lower, region.bottom)
                )
                lines.append(Lines(rise=rise, share=share, both=both))
            return torch.rand(self.variables, generator=generator).double(), lines

        monkeypatch.setattr(complete._Search, "resist", lambda *args: True)
        if solver == "random":
            monkeypatch.setattr(linear_program.Program, "solve", draw)
        graph = deep_network(seed)
        x, label, executions = problem(graph, seed)
        assert decide(OfGraph(graph), executions, x, label, Linf(1.01 * eps), seconds=0.7).verdict == "undecided"
        assert decide(OfGraph(graph), executions, x, label, Linf(0.2 * eps), seconds=30).verdict == "certified"

    def test_a_solver_that_fails(self, monkeypatch):
        graph = deep_network(7)
        x, label, executions = problem(graph, 7)
        monkeypatch.setattr(linear_program.Program, "solve", lambda *args: None)
        assert decide(OfGraph(graph), executions, x, label, Linf(0.22), seconds=30).verdict == "undecided"

    def test_every_execution_is_proved(self):
        graph = small_networks(0)["ReLU"]
        x, label, executions = problem(graph)
        last = graph.nodes[-1].op
        other = Linear(np.roll(last.weight, 1, 0), np.roll(last.bias, 1))
        wrong = Graph(graph.input_shape, (*graph.nodes[:-1], replace(graph.nodes[-1], op=other)))
        also = Execution(graph=wrong, rounding=Rounding())
        assert decide(OfGraph(graph), executions, x, label, Linf(0.01), seconds=30).verdict == "certified"
        for both in ([*executions, also], [also, *executions]):
            assert decide(OfGraph(graph), both, x, label, Linf(0.01), seconds=30).verdict == "undecided"

    def test_branches_are_bounded_again_for_another_execution(self, monkeypatch):
        """The branches that prove one execution prove an equal one; for a worse one its own bounds count."""
        graph = deep_network(7)
        x, label, executions = problem(graph, 7)
        run = partial(decide, OfGraph(graph), x=x, label=label, threat=Linf(0.22), seconds=30)
        once, twice = (run(executions=executions * times) for times in (1, 2))
        assert once.verdict == twice.verdict == "certified"
        assert once.branches == twice.branches > 5
        last = graph.nodes[-1].op
        bias = last.bias.copy()
        bias[(label + 1) % 3] += 0.5
        worse = Graph(graph.input_shape, (*graph.nodes[:-1], replace(graph.nodes[-1], op=Linear(last.weight, bias))))
        both = [*executions, Execution(graph=worse, rounding=Rounding())]
        outcome = run(executions=both)
        assert outcome.verdict == "undecided"
        assert decide(OfGraph(worse), both, x, label, Linf(0.22), seconds=30).verdict == "broken"

    def test_ties(self):
        """Logits that float32 cannot tell apart, and equal ones, are not certified."""
        tie = np.array([[1.0, 2.0**-30], [1.0, 0.0]], np.float32)
        for weight in (tie, np.ones((2, 2), np.float32)):
            graph = chain((1, 1, 2), Flatten(), Linear(weight, np.zeros(2, np.float32)))
            executions = [Execution(graph=graph, rounding=Rounding())]
            outcome = decide(OfGraph(graph), executions, torch.ones(1, 1, 2), 0, Linf(1e-6), seconds=30)
            assert outcome.verdict == "undecided"

    def test_an_image_that_is_wrong_is_broken_by_itself(self):
        graph = small_networks(0)["ReLU"]
        x, label, executions = problem(graph)
        outcome = decide(OfGraph(graph), executions, x, (label + 1) % 3, Linf(0.01), seconds=30)
        assert outcome.verdict == "broken"
        assert torch.equal(outcome.image, x)


class TestEffort:
    def test_the_time_limit(self):
        """An image that takes about a hundred branches is undecided after a few."""
        graph = deep_network(0)
        x, label, executions = problem(graph)
        outcome = decide(OfGraph(graph), executions, x, label, Linf(0.159), seconds=0.05)
        assert outcome.verdict == "undecided"
        assert outcome.branches < 50
        assert outcome.unstable > 10
        assert outcome.seconds > 0.05

    def test_the_program_is_no_looser_than_optimized_lines(self):
        """Its lines give the best bound that lines can give."""
        for name, graph in small_networks(1).items():
            x, label, (execution,) = problem(graph, 1)
            around = Reducer(execution).reduce(x, label, Linf(0.2))
            tree = complete._Tree(around)
            optimized = around.bound(30)[0].values
            for branch in tree.root():
                bounded = tree.bound(branch, 30.0)
                assert bounded.value <= float(optimized[branch.target]) + 1e-6, name
