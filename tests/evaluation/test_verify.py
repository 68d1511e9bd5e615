"""Proofs are sound: what runs in float32 never leaves the bounds, and no proof reaches beyond an exact radius."""

import copy
import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from compilers import find_compiler
from networks import EXTREMES, chain, conv, images_of, random_graph, with_classifier
from small_networks import build_hidden
from test_attacks_exact import DUAL, at_radius, exact_radius, linear_model, network
from torch import Tensor, nn
from torch.nn import functional as F

import atmc
from atmc.compress.factorize import factorize
from atmc.deploy.engine.sparse import SparseNetwork
from atmc.deploy.export.c.source import to_c
from atmc.deploy.graph.graph import Add, Affine, Conv, Flatten, GlobalAvgPool, Graph, Linear, Node, Relu, run_graph
from atmc.evaluation import autoattack
from atmc.evaluation.verify import bounds, stages
from atmc.evaluation.verify.bounds import (
    RULES,
    Box,
    Rounding,
    bound_images,
    bound_logits,
    bound_margins,
    check_finite,
    prove,
)
from atmc.evaluation.verify.complete import Outcome
from atmc.evaluation.verify.executions import list_executions, prove_executions
from atmc.evaluation.verify.verify import verify
from atmc.robust import intervals
from atmc.robust.threats import L2, Linf

EXACT = Rounding(outward=False)


def factors_network(seed: int) -> Graph:
    """Build a network whose two layers run as factors V, U and C, as `expand_factors` makes them."""
    rng = np.random.default_rng(seed)
    geometry = {"stride": (2, 2), "padding": (1, 1)}

    def layer(kind: Callable[..., object], *shape: int, **options: object) -> object:
        weight = rng.standard_normal(shape).astype(np.float32)
        return kind(weight, rng.standard_normal(shape[0]).astype(np.float32), **options)

    ops = [layer(Conv, 3, 2, 3, 3, **geometry), layer(Conv, 5, 3, 1, 1), layer(Conv, 5, 2, 3, 3, **geometry)]
    nodes = [Node(op, (value,)) for op, value in zip(ops, (0, 1, 0), strict=True)]
    nodes += [Node(Add(), (2, 3)), Node(Relu(), (4,)), Node(Flatten(), (5,)), Node(layer(Linear, 4, 45), (6,))]
    nodes += [Node(layer(Linear, 3, 4), (7,)), Node(layer(Linear, 3, 45), (6,)), Node(Add(), (9, 8))]
    return Graph((2, 6, 6), tuple(nodes))


NETWORKS = {
    "factors": factors_network(0),
    "other factors": factors_network(1),
    **EXTREMES,
    **{f"random {seed}": random_graph(seed) for seed in range(24)},
}
RUNS: dict[str, Callable[[Graph], Callable[[Tensor], Tensor]]] = {
    "torch": lambda graph: lambda x: run_graph(graph, x),
    "torch, one by one": lambda graph: lambda x: torch.cat([run_graph(graph, one) for one in x[:50].split(1)]),
    "sparse": lambda graph: lambda x: torch.from_numpy(SparseNetwork(graph)(x.numpy())),
    "numba": lambda graph: lambda x: torch.from_numpy(SparseNetwork(graph, kernel="numba")(x.numpy())),
}


def points(x: Tensor, eps: float, n: int) -> Tensor:
    """Draw n images of the threat around x (1, c, h, w): a third at corners, a third of few corner pixels, others."""
    generator = torch.Generator().manual_seed(0)
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    share = torch.rand(n, *x.shape[1:], generator=generator)
    share[: n // 3] = share[: n // 3].round()
    mixed = share[n // 3 : 2 * n // 3]
    mixed[mixed > 0.5] = 1.0
    return torch.clamp(low + share * (high - low), min=low, max=high)


def escaped(graph: Graph, box: Box, images: Tensor, run: Callable[[Tensor], Tensor], rounding: Rounding) -> int:
    """Count the logits of images that leave the bounds of a box."""
    limits, logits = bound_logits(graph, box, rounding), run(images).double()
    lower, upper = (values.expand(len(images), -1)[: len(logits)] for values in (limits.lower, limits.upper))
    return int(((logits < lower) | (logits > upper)).sum())


class TestBounds:
    @pytest.mark.parametrize("run", RUNS)
    @pytest.mark.parametrize("name", NETWORKS)
    def test_nothing_leaves_the_bounds(self, name, run):
        graph = NETWORKS[name]
        x = torch.from_numpy(images_of(graph, 1))
        for eps in (0.3, 0.01):
            box = bound_images(x, Linf(eps))
            images = points(x, eps, 2500)
            assert escaped(graph, box, images, RUNS[run](graph), Rounding()) == 0

    @pytest.mark.parametrize("run", RUNS)
    @pytest.mark.parametrize("name", NETWORKS)
    def test_rounding_stays_within_the_margin(self, name, run):
        """The box is a single image, so that the bounds are nothing but margin around the exact logits."""
        graph = NETWORKS[name]
        x = torch.from_numpy(images_of(graph, 60))
        assert escaped(graph, Box(x.double(), x.double()), x, RUNS[run](graph), Rounding()) == 0

    @pytest.mark.parametrize("flags", [["-O2"], ["-O3", "-march=native", "-ffp-contract=fast"]], ids=" ".join)
    def test_exported_c_stays_within_the_margin(self, tmp_path, flags):
        graphs = {f"net{position}": graph for position, graph in enumerate(NETWORKS.values()) if graph.nodes[1:]}
        for name, graph in graphs.items():
            source = to_c(graph, name=name)
            (tmp_path / f"{name}.h").write_text(source.header)
            (tmp_path / f"{name}.c").write_text(source.source)
        files = [f"{name}.c" for name in graphs]
        command = [find_compiler("C"), "-std=c99", *flags, *files, "-shared", "-fPIC", "-o", "all.so"]
        subprocess.run(command, cwd=tmp_path, check=True)
        library, pointer = ctypes.CDLL(str(tmp_path / "all.so")), ctypes.POINTER(ctypes.c_float)
        for name, graph in graphs.items():
            x = torch.from_numpy(images_of(graph, 30))
            logits = np.zeros((len(x), *graph.shapes()[-1]), np.float32)
            for image, row in zip(x.numpy(), logits, strict=True):
                getattr(library, f"{name}_run")(image.ctypes.data_as(pointer), row.ctypes.data_as(pointer))
            computed = torch.from_numpy(logits)
            assert escaped(graph, Box(x.double(), x.double()), x, lambda _, c=computed: c, Rounding()) == 0

    def test_without_the_margin_rounding_would_leave_the_bounds(self):
        """The test above can fail."""
        for run in ("torch", "sparse"):
            escapes = 0
            for graph in NETWORKS.values():
                x = torch.from_numpy(images_of(graph, 60))
                escapes += escaped(graph, Box(x.double(), x.double()), x, RUNS[run](graph), EXACT)
            assert escapes > 1000

    @pytest.mark.parametrize("rule", [rule for rule in RULES if rule is not Flatten])
    def test_a_wrong_rule_is_seen(self, rule, monkeypatch):
        right = RULES[rule]

        def narrowed(op, inputs, rounding):
            box = right(op, inputs, rounding)
            middle, radius = (box.upper + box.lower) / 2, (box.upper - box.lower) / 2
            return Box(middle - 0.2 * radius, middle + 0.2 * radius, box.terms, box.count)

        monkeypatch.setitem(RULES, rule, narrowed)
        escapes = 0
        for graph in NETWORKS.values():
            x = torch.from_numpy(images_of(graph, 1))
            escapes += escaped(graph, bound_images(x, Linf(0.3)), points(x, 0.3, 500), RUNS["torch"](graph), Rounding())
        assert escapes > 0

    def test_factors_are_bounded_as_the_layers_that_they_are(self, monkeypatch):
        """The bounds of U (V x) + C x are those of (U V + C) x; the margin alone differs."""
        graph = factors_network(0)
        conv_v, conv_u, conv_c, *_ = (node.op for node in graph.nodes)
        linear_v, linear_u, linear_c = (graph.nodes[index].op for index in (6, 7, 8))
        u = conv_u.weight[:, :, 0, 0].astype(np.float64)
        one = Conv(
            np.einsum("or,rihw->oihw", u, conv_v.weight) + conv_c.weight,
            u @ conv_v.bias + conv_u.bias + conv_c.bias,
            stride=(2, 2),
            padding=(1, 1),
        )
        u = linear_u.weight.astype(np.float64)
        two = Linear(u @ linear_v.weight + linear_c.weight, u @ linear_v.bias + linear_u.bias + linear_c.bias)
        whole = chain((2, 6, 6), one, Relu(), Flatten(), two)
        x = torch.from_numpy(images_of(graph, 4))
        box, labels = bound_images(x, Linf(0.1)), torch.tensor([0, 1, 2, 0])
        margins = [bound_margins(one_graph, box, labels, EXACT) for one_graph in (graph, whole)]
        finite = margins[0].isfinite()
        assert torch.allclose(margins[0][finite], margins[1][finite], rtol=1e-10)
        sound = bound_margins(graph, box, labels) - margins[1]
        assert 0 < float(sound[finite].min()) <= float(sound[finite].max()) < 0.02
        monkeypatch.setattr(bounds, "_compose", lambda first, second: None)
        assert float((bound_margins(graph, box, labels, EXACT) - margins[1])[finite].min()) > 1

    def test_a_wrong_composition_is_seen(self, monkeypatch):
        compose = bounds._compose

        def wrong(first, second):
            form = compose(first, second)
            return form and replace(form, bias=form.bias + 1)

        monkeypatch.setattr(bounds, "_compose", wrong)
        graph = factors_network(0)
        x = torch.from_numpy(images_of(graph, 20))
        assert escaped(graph, Box(x.double(), x.double()), x, RUNS["torch"](graph), Rounding()) > 0

    @pytest.mark.parametrize("name", NETWORKS)
    def test_the_margin_widens_and_eps_too(self, name):
        graph = NETWORKS[name]
        x = torch.from_numpy(images_of(graph, 3))
        sound, exact = (bound_logits(graph, bound_images(x, Linf(0.1)), one) for one in (Rounding(), EXACT))
        assert bool((sound.lower <= exact.lower).all())
        assert bool((sound.upper >= exact.upper).all())
        smaller = bound_logits(graph, bound_images(x, Linf(0.05)))
        assert bool(((sound.lower <= smaller.lower) & (smaller.upper <= sound.upper)).all())
        assert float((sound.upper - exact.upper).max()) < 1e-3 * float(exact.upper.abs().max() + 1)

    @pytest.mark.parametrize("name", NETWORKS)
    def test_margins_are_bounds_of_differences_and_no_looser_than_those_of_logits(self, name):
        graph = NETWORKS[name]
        x = torch.from_numpy(images_of(graph, 1))
        box, classes = bound_images(x, Linf(0.1)), graph.shapes()[-1][0]
        logits, limits = run_graph(graph, points(x, 0.1, 1000)).double(), bound_logits(graph, box)
        for y in range(min(classes, 3)):
            margins = bound_margins(graph, box, torch.tensor([y]))
            differences = (logits - logits[:, y : y + 1]).index_fill(1, torch.tensor([y]), -torch.inf)
            assert bool((differences <= margins).all())
            loose = (limits.upper - limits.lower[:, y : y + 1]).index_fill(1, torch.tensor([y]), -torch.inf)
            assert bool((margins <= loose + 1e-9 * loose.abs().clamp(max=1e9)).all())

    def test_every_image_that_counts_as_an_attack_lies_inside(self):
        """Images of the largest distance that counts, and those that float32 makes of x - eps and x + eps."""
        x = torch.rand(200, 1, 3, 3, generator=torch.Generator().manual_seed(0))
        for eps in (8 / 255, 76 / 255, 0.1, 1e-4):
            threat, box = Linf(eps), bound_images(x, Linf(eps))
            ends = [threat.project(x + sign, x) for sign in (-1.0, 1.0)]
            slack = [(x + sign * eps * (1 + 0.99e-4)).clamp(0, 1) for sign in (-1, 1)]
            for images in (*ends, *slack):
                assert bool(((box.lower <= images) & (images <= box.upper)).all())
            assert float(box.lower.min()) >= 0
            assert float(box.upper.max()) <= 1
            assert float((box.upper - x).max()) < eps * 1.0002 + 2e-7

    def test_training_bounds_agree(self):
        """The float32 bounds of training are these, up to rounding."""
        model = atmc.models.build("lenet", 10, seed=0).eval()
        x, y = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(8)
        with torch.no_grad():
            training = intervals.margins(intervals.bound_logits(model, x, Linf(0.02)), y)
        (execution, *_) = list_executions(model, (1, 28, 28))
        mine = bound_margins(execution.graph, bound_images(x, Linf(0.02)), y, execution.rounding)
        others = F.one_hot(y, 10) == 0
        assert torch.allclose(training[others].double(), mine[others], rtol=1e-3, atol=1e-4)
        assert bool((training[others] < mine[others] + 1e-6).all())


def batch_norm_network(*, affine: bool = True) -> nn.Module:
    """Build a network whose batch norms have a shift that is a small difference of large terms."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, affine=affine)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        norm.running_mean.uniform_(900, 1100)
        norm.running_var.uniform_(0.5, 2)
        model[0].bias.copy_(norm.running_mean)
        if affine:
            norm.weight.uniform_(0.5, 2)
            norm.bias.copy_(0.001 * torch.randn(4))
    return model


class TestModules:
    @pytest.mark.parametrize("affine", [True, False])
    def test_batch_norm_rounds_the_terms_of_its_shift(self, affine):
        model = batch_norm_network(affine=affine)
        x = torch.rand(300, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        (execution, *_) = list_executions(model, (1, 6, 6))
        box = Box(x.double(), x.double())
        with torch.no_grad():
            assert escaped(execution.graph, box, x, model, execution.rounding) == 0
            assert (
                escaped(execution.graph, box, x, model.to(memory_format=torch.channels_last), execution.rounding) == 0
            )
        terms = next(iter(execution.rounding.shift_terms.values()))
        assert terms.min() > 100

    @pytest.mark.parametrize("name", ["lenet", "lenet-caffe", "resnet18", "mobilenetv2", "wrn-10-1"])
    def test_the_zoo(self, name):
        """All that runs of a network of the zoo stays within its own bounds."""
        shape = (1, 28, 28) if name.startswith("lenet") else (3, 16, 16)
        model = atmc.models.build(name, 10, seed=0, input_shape=shape).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.normal_(module.bias)
        x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
        executions = list_executions(model, shape)
        box = Box(x.double(), x.double())
        with torch.no_grad():
            assert escaped(executions[0].graph, box, x, model, executions[0].rounding) == 0
        for execution in executions[1:]:
            for run in ("torch", "sparse"):
                assert escaped(execution.graph, box, x, RUNS[run](execution.graph), execution.rounding) == 0

    def test_factors_run_too(self):
        """PyTorch, and one form of the C export, run a layer whole; the engine and another form run its factors."""
        torch.manual_seed(0)
        model = factorize(nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 3)), start="svd")
        with torch.no_grad():
            model[1].parametrizations.weight.original0[:, 2:] = 0  # U, to rank 2
        executions = list_executions(model, (1, 6, 6))
        layers = [[type(node.op) for node in execution.graph.nodes].count(Linear) for execution in executions]
        assert layers == [2, 4]
        x = torch.rand(200, 1, 6, 6)
        with torch.no_grad():
            y = model(x).argmax(1)
        both, alone = (prove_executions(some, x, y, Linf(0.01)) for some in (executions, executions[:1]))
        assert 0 < int(both.sum()) <= int(alone.sum()) < 200

    def test_graphs_that_are_the_same_are_listed_once(self):
        plain, normalized = linear_model(3, 2), nn.Sequential(atmc.models.Normalize([0.3], [0.7]), linear_model(3, 2))
        assert len(list_executions(plain, (1, 2, 2))) == 1
        graphs = [execution.graph for execution in list_executions(normalized, (1, 2, 2))]
        assert [type(graph.nodes[0].op) for graph in graphs] == [Affine, Flatten, Affine]

    def test_a_proof_needs_every_execution(self):
        model, x = linear_model(3, 2), torch.rand(1, 1, 2, 2)
        with torch.no_grad():
            y = model(x).argmax(1)
        (execution,) = list_executions(model, (1, 2, 2))
        assert bool(prove_executions([execution, execution], x, y, Linf(1e-4)).all())
        last = execution.graph.nodes[-1].op
        graph = chain((1, 2, 2), Flatten(), Linear(-last.weight, last.bias))
        wrong = [execution, type(execution)(graph=graph, rounding=Rounding())]
        assert not bool(prove_executions(wrong, x, y, Linf(1e-4)).any())


class TestExact:
    @pytest.mark.parametrize("classes", [2, 5])
    def test_linear_models_are_certified_up_to_the_exact_radius(self, classes):
        model = linear_model(classes, side=6)
        images = at_radius(model, "linf", 0.004, n=6, side=6)
        assert DUAL["linf"] == 1
        assert verify(model, images_pair(images), threat=Linf(0.998 * 0.004)).verdicts == ("certified",) * 6
        assert "certified" not in verify(model, images_pair(images), threat=Linf(1.0001 * 0.004)).verdicts

    def test_no_proof_beyond_the_exact_radius_of_a_relu_network(self):
        model = network()
        x = torch.rand(12, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            y = model(x).argmax(1)
        executions, proved = list_executions(model, (1, 2, 2)), 0
        for image, label in zip(x[:, None], y[:, None], strict=True):
            radius = exact_radius(model, image.flatten().double().numpy(), int(label), "linf")
            for share in (0.1, 0.3, 0.5, 0.9, 0.99):
                if share * radius < 1:
                    proved += int(prove_executions(executions, image, label, Linf(share * radius)))
            if radius < 0.99:
                for share in (1.0, 1.001, 1.01):
                    assert not bool(prove_executions(executions, image, label, Linf(share * radius)))
        assert proved > 15

    def test_a_tie_is_not_certified(self):
        model = linear_model(3, side=2)
        with torch.no_grad():
            model[1].weight[2] = model[1].weight[1]
            model[1].weight[0] -= model[1].weight[0].mean() - model[1].weight[1].mean()
            x = torch.rand(40, 1, 2, 2, generator=torch.Generator().manual_seed(0))
            y = model(x).argmax(1)
        assert set(y.tolist()) == {0, 1}
        proved = prove_executions(list_executions(model, (1, 2, 2)), x, y, Linf(1e-6))
        assert bool(proved[y == 0].all())
        assert not bool(proved[y == 1].any())
        pixels = chain((1, 1, 2), Flatten())  # no rounding at all
        x = torch.full((1, 1, 1, 2), 0.5)
        for y in (0, 1):
            assert not bool(prove(pixels, Box(x.double(), x.double()), torch.tensor([y])))

    def test_a_tie_of_rounding_is_not_certified(self):
        """Logits that differ by less than float32 can tell are equal for what runs."""
        weight = np.array([[1.0, 2.0**-30], [1.0, 0.0]], np.float32)
        graph = chain((1, 1, 2), Flatten(), Linear(weight, np.zeros(2, np.float32)))
        x = torch.ones(1, 1, 1, 2)
        box = Box(x.double(), x.double())
        assert float(run_graph(graph, x)[0].diff()) == 0
        assert bool(prove(graph, box, torch.tensor([0]), EXACT))
        assert not bool(prove(graph, box, torch.tensor([0])))

    def test_overflow_is_not_certified(self):
        """In float32 the hidden values are infinite, and the logits not numbers."""
        large = np.full((2, 4), 3e38, np.float32)
        last = Linear(np.array([[1.0, 0.0], [0.0, -1.0]], np.float32), np.zeros(2, np.float32))
        graph = chain((1, 2, 2), Flatten(), Linear(large, np.zeros(2, np.float32)), Relu(6.0), last)
        x = torch.ones(1, 1, 2, 2)
        box = Box(x.double(), x.double())
        assert bool(prove(graph, box, torch.tensor([0]), EXACT))
        assert not bool(prove(graph, box, torch.tensor([0])))
        large_pixels = Affine(np.full(1, 1e38, np.float32), np.zeros(1, np.float32))
        means = with_classifier(chain((1, 2, 2), large_pixels, GlobalAvgPool()), classes=2)
        assert bool(bound_logits(means, box).upper.isnan().all())


def images_pair(images: object) -> tuple[Tensor, Tensor]:
    return images.pixels, images.labels


def fit_digits() -> nn.Module:
    """Fit a linear model of the digits by least squares on one-hot labels."""
    train = atmc.load_data("digits").train
    x, y = train.float_pixels(slice(None)).flatten(1), F.one_hot(train.labels, 10).float()
    weight = torch.linalg.solve(x.T @ x + 50 * torch.eye(784), x.T @ (10 * y - 5))
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(weight.T)
    return model


@pytest.fixture(scope="module")
def hidden():
    return build_hidden()


@pytest.fixture(scope="module")
def result():
    return verify(fit_digits(), atmc.load_data("digits").test, threat="linf:0.02", n=100, batch_size=30, linear=True)


class TestVerify:
    def test_verdicts_and_figures(self, result):
        """The linear model's proofs are complete, so that nothing is undecided."""
        assert len(result.verdicts) == 100
        assert result.undecided == 0
        assert 0 < result.certified.accuracy < result.clean.accuracy <= 1
        assert result.certified.accuracy == result.attacked.accuracy
        assert sum(result.by_stage.values()) == 100
        assert result.taken["clean"] == 100
        assert result.taken["interval"] == 100 - result.by_stage["clean"]
        json = result.to_json()
        assert json["certified"]["by"] == {"interval": json["certified"]["accuracy"], "linear": 0}
        assert json["certified"]["undecided"] == 0
        assert json["certified"]["n"] == 100
        assert json["certified"]["ci95"][0] < json["certified"]["accuracy"] < json["certified"]["ci95"][1]
        assert set(json["attacked"]["broken_by"]) == {"clean", "pgd-strong", "interval-pgd"}
        lost = sum(json["attacked"]["broken_by"].values())
        assert lost == pytest.approx(1 - json["attacked"]["accuracy"])

    def test_they_do_not_depend_on_the_batches(self, result):
        other = verify(fit_digits(), atmc.load_data("digits").test, threat="linf:0.02", n=100, batch_size=7)
        assert other.decided_by == result.decided_by

    def test_evaluate_agrees(self, result):
        """What is broken is what the attack breaks, and no certified image is."""
        report = atmc.evaluate(
            fit_digits(), atmc.load_data("digits").test, threat="linf:0.02", attack="pgd-strong", n=100, checks=False
        )
        right = report.attacks["pgd-strong"].right.tolist()
        assert [verdict != "broken" for verdict in result.verdicts] == right

    def test_autoattack_takes_what_is_undecided(self, monkeypatch):
        monkeypatch.setattr(autoattack, "QUERIES", 100)
        torch.manual_seed(0)
        hidden = nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.ReLU(), nn.Linear(30, 10))
        images = torch.rand(12, 1, 28, 28)
        with torch.no_grad():
            labels = hidden(images).argmax(1)
        result = verify(hidden, (images, labels), threat=Linf(0.003), autoattack=True)
        assert result.stages == ("clean", "interval", "pgd-strong", "interval-pgd", "autoattack")
        before = 12 - sum(result.by_stage[name] for name in result.stages[:-1])
        assert result.taken["autoattack"] == before > 0
        assert set(result.settings) == {"pgd-strong", "interval-pgd", "autoattack"}

    def test_a_module_that_does_not_run_on_intervals_is_verified_by_its_graph_alone(self, monkeypatch):
        monkeypatch.delitem(intervals.RULES, "linear")
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(6, 1, 4, 4)
        result = verify(model, (x, model(x).argmax(1)), threat=Linf(1e-4))
        assert result.stages == ("clean", "interval", "pgd-strong")
        assert result.certified.accuracy > 0.5

    def test_the_complete_method_decides_the_rest(self, hidden):
        """Every stage has its share, and the images that break others are of the threat."""
        test = atmc.load_data("digits").test
        result = verify(hidden, test, threat="linf:0.1", n=80, time_per_image=60)
        assert result.undecided == 0
        assert result.stages == ("clean", "interval", "pgd-strong", "interval-pgd", "linear", "complete")
        assert result.taken["complete"] == len(result.searched) == result.by_stage["complete"]
        shares = {verdict: result.count("complete", verdict) for verdict in ("certified", "broken")}
        assert min(shares.values()) > 0
        assert sum(shares.values()) == result.taken["complete"]
        assert result.certified.accuracy == result.attacked.accuracy
        wrong = result.examples.predictions != result.examples.labels
        assert [verdict == "broken" for verdict in result.verdicts] == wrong.tolist()
        distance = Linf(0.1).distance(result.examples.adv, test.float_pixels(slice(0, 80)))
        assert float(distance.max()) <= 0.1 * (1 + 1e-4)
        assert 0 <= float(result.examples.adv.min()) <= float(result.examples.adv.max()) <= 1
        figures = result.to_json()
        search = figures["complete"]
        assert search["seconds"]["min"] <= search["seconds"]["median"] <= search["seconds"]["p90"]
        assert search["unstable"]["max"] == max(one["unstable"] for one in search["by_image"]) <= 12
        assert figures["certified"]["by"]["complete"] == shares["certified"] / 80
        assert figures["attacked"]["broken_by"]["complete"] == shares["broken"] / 80
        (row,) = [row for row in figures["stages"] if row["stage"] == "complete"]
        assert {key: row[key] for key in shares} == shares

    def test_time_limits_leave_images_undecided(self, hidden):
        test = atmc.load_data("digits").test
        result = verify(hidden, test, threat="linf:0.1", n=80, time_per_image=1e-9)
        assert result.undecided > 0
        assert result.to_json()["complete"]["undecided"] == result.undecided * 80
        assert max(one.seconds for one in result.searched) < 5

    @pytest.mark.parametrize(
        "change",
        [lambda x: x, lambda x: (x + 0.3).clamp(max=1), lambda x: x - 0.05, lambda x: x * torch.nan],
        ids=["an image that is right", "outside the ball", "outside [0, 1]", "not a number"],
    )
    def test_broken_counts_only_if_the_model_errs_on_an_image_that_counts(self, hidden, monkeypatch, change):
        def claim(model, executions, x, label, threat, **options):
            return Outcome(verdict="broken", image=change(x), unstable=0, branches=0, seconds=0.0)

        monkeypatch.setattr(stages, "decide", claim)
        images = atmc.load_data("digits").test.take(slice(0, 40))
        result = verify(hidden, images, threat="linf:0.05", n=40, time_per_image=1)
        assert result.taken["complete"] == result.verdicts.count("undecided") > 0

    def test_the_model_stays_as_it_is(self):
        """It is verified in evaluation mode, and stays in training mode."""
        model, x = batch_norm_network(), torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model.train()(x)  # which moves the averages
            assert bool((copy.deepcopy(model)(x).argmax(1) != copy.deepcopy(model).eval()(x).argmax(1)).any())
            images = x, copy.deepcopy(model).eval()(x).argmax(1)
        state = copy.deepcopy(model.state_dict())
        result = verify(model, images, threat=Linf(0.001))
        assert "certified" in result.verdicts
        assert result.verdicts == verify(copy.deepcopy(model).eval(), images, threat=Linf(0.001)).verdicts
        assert model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class TestRefused:
    PAIR = (torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))

    @pytest.mark.parametrize(
        ("threat", "message"),
        [
            ("linf:0", "expected a finite eps > 0, got 0"),
            ("linf:8", r"eps 8 is above the largest linf distance in \[0, 1\].*is linf:8/255 meant"),
            ("l2:0.5", "proofs exist for linf only, got l2:0.5"),
            (L2(0.1), "proofs exist for linf only"),
            ("linf:nan", "expected a finite eps"),
        ],
    )
    def test_threats(self, threat, message):
        with pytest.raises(ValueError, match=message):
            verify(linear_model(2, 2), self.PAIR, threat=threat)

    def test_values_that_are_not_finite(self):
        for value in (torch.nan, torch.inf):
            model = linear_model(2, 2)
            with torch.no_grad():
                model[1].weight[0, 0] = value
            with pytest.raises(ValueError, match="the weight of Linear 1 is not finite: nothing can be proved"):
                verify(model, self.PAIR, threat="linf:0.1")
        affine = Affine(np.array([np.nan], np.float32), np.zeros(1, np.float32))
        with pytest.raises(ValueError, match="the scale of Affine bn is not finite"):
            check_finite(Graph((1, 2, 2), (Node(affine, (0,), "bn"),)))

    def test_images_outside_the_box(self):
        for pixel in (-0.01, 1.01, torch.nan):
            x = torch.rand(1, 1, 2, 2)
            x[0, 0, 0, 0] = pixel
            with pytest.raises(ValueError, match=r"expected pixels in \[0, 1\]"):
                bound_images(x, Linf(0.1))
            with pytest.raises(ValueError, match=r"\[0, 1\]"):
                verify(linear_model(2, 2), (x, torch.tensor([0])), threat="linf:0.1")

    def test_operations_without_a_rule(self, monkeypatch):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
        with pytest.raises(ValueError, match=r"cannot verify the model: aten.gelu of layer 2 is not supported"):
            verify(model, self.PAIR, threat="linf:0.1")
        monkeypatch.delitem(RULES, Relu)
        graph = with_classifier(chain((1, 4, 4), conv(2, 1, 3, 3), Relu()))
        x = torch.rand(1, 1, 4, 4)
        with pytest.raises(ValueError, match="there is no rule for the bounds of Relu"):
            bound_logits(graph, bound_images(x, Linf(0.1)))

    def test_options(self):
        for options, message in (
            ({"n": 0}, "n >= 1"),
            ({"batch_size": 0}, "batch_size >= 1"),
            ({"seed": -1}, "seed"),
            ({"processes": 0}, "processes >= 1"),
            ({"time_per_image": 0}, "per image > 0"),
            ({"time_per_image": torch.nan}, "per image > 0"),
        ):
            with pytest.raises(ValueError, match=message):
                verify(linear_model(2, 2), self.PAIR, threat="linf:0.1", **options)
        with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module"):
            verify("model", self.PAIR, threat="linf:0.1")
        with pytest.raises(ValueError, match="the labels go up to 7"):
            verify(linear_model(2, 2), (self.PAIR[0], torch.tensor([0, 7])), threat="linf:0.1")
