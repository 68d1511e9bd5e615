"""Linear bounds are sound for what runs in float32, whatever lines are chosen, and never looser than they should be."""

import pytest
import torch
from networks import EXTREMES, chain, conv, images_of, random_graph, with_classifier
from test_verify import factors_network, points
from torch import Tensor

from atmc.deploy.engine.sparse import SparseNetwork
from atmc.deploy.graph.graph import Conv, Graph, MaxPool, Relu, run_graph
from atmc.evaluation.verify.bounds import Rounding
from atmc.evaluation.verify.executions import Execution
from atmc.evaluation.verify.linear import Neighborhood, Reducer
from atmc.evaluation.verify.lines import Level, Lines, Region, bound_above, optimize
from atmc.robust.threats import Linf

EXACT = Rounding(outward=False)


def dense_conv(outputs: int, inputs: int, side: int) -> Conv:
    return conv(outputs, inputs, side, side, density=1)


NETWORKS = {
    "factors": factors_network(0),
    **EXTREMES,
    "overlapping windows": with_classifier(
        chain(
            (2, 7, 7), conv(3, 2, 3, 3, density=1), MaxPool((3, 3), (2, 2), (1, 1)), Relu(), conv(2, 3, 2, 2, density=1)
        )
    ),
    "ReLU, then windows": with_classifier(
        chain(
            (1, 8, 8), conv(3, 1, 3, 3, density=1), Relu(), MaxPool((2, 2), (2, 2)), conv(4, 3, 2, 2, density=1), Relu()
        )
    ),
    "ceilings": with_classifier(
        chain((2, 5, 5), conv(4, 2, 3, 3, density=1), Relu(0.8), conv(4, 4, 2, 2, density=1), Relu(1.5))
    ),
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
            images = points(x, eps, 600)
            around = reduce(graph, x, label, eps)
            assert escapes(around, run_graph(graph, images), label) == 0
            assert escapes(around, torch.from_numpy(SparseNetwork(graph)(images.numpy())), label) == 0
