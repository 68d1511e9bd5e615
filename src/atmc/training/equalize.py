"""Give the weights of neighboring layers equal sizes, without a change of what the network decides, before pruning.

A budget over all layers keeps the largest weights, but how large they are is arbitrary: if only ReLUs, pooling and
flattening lie between two layers, the weights into a channel may be multiplied by c > 0 and those out of it divided by
c. A layer of small weights would lose all of them. Of all such networks this takes the one with the smallest sum of
squared weights: there, those into a channel have the same Euclidean norm as those out of it. Nagel et al. 2019,
section 4.1, scale channels likewise, by their ranges, for quantization.

The last layer has a freedom of its own: what is added to all rows of its weight alike changes no difference of logits,
and so neither decisions nor losses. Networks that were trained for interval bounds have most entries of a column equal,
which costs a nonzero each; less the column's median they are near zero.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from atmc.deploy.graph.graph import AvgPool, Conv, Flatten, GlobalAvgPool, Graph, Linear, MaxPool, Relu
from atmc.deploy.graph.trace import UnsupportedModel, trace

SWEEPS, CLOSE = 200, 1e-4  # at most so many rounds over all pairs, until no scale differs from 1 by more than this
Layer = nn.Conv2d | nn.Linear


@torch.no_grad()
def equalize(model: nn.Module, input_shape: tuple[int, ...]) -> list[tuple[str, str]]:
    """Scale the weights into and out of the channels between two layers to equal norms, and center the last layer.

    The model is changed in place. Its logits change by one number per image, the same for all classes.

    A pair of layers stays as it is if a weight of it is used more than once, is frozen, or is no plain parameter of a
    torch convolution or linear layer (a factorized one is not), or if the second one is a grouped convolution. So does
    a channel into which, or out of which, all weights are zero, and a model that cannot be traced.

    Returns:
        The names of the weights of each pair.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    >>> _ = model[1].weight.data.fill_(0.01), model[3].weight.data.copy_(torch.tensor([[0.0], [4.0]]))
    >>> equalize(model, (1, 1, 1))
    [('1.weight', '3.weight')]
    >>> round(model[1].weight.item(), 3), round(model[3].weight[1].item(), 3)
    (0.2, 0.2)
    """
    try:
        traced = trace(model, input_shape)
    except UnsupportedModel:
        return []
    uses = Counter(traced.weight_names.values())
    layers: dict[str, Layer] = {
        f"{path}.weight" if path else "weight": module
        for path, module in model.named_modules()
        if isinstance(module, Layer)
        and "weight" in dict(module.named_parameters(recurse=False))
        and _is_trained(module)
    }
    pairs = [
        (first, second)
        for first, second in (
            (traced.weight_names[one], traced.weight_names[other]) for one, other in find_pairs(traced.graph)
        )
        if all(name in layers and uses[name] == 1 for name in (first, second))
    ]
    last = traced.weight_names.get(traced.graph.nodes[-1].op, "")
    if last in layers and uses[last] == 1 and isinstance(layers[last], nn.Linear):
        weight = layers[last].weight
        weight.sub_(weight.sort(0).values[(len(weight) - 1) // 2])  # torch's median is not deterministic on CUDA
    for _ in range(SWEEPS):
        changes = [_balance(layers[first], layers[second]) for first, second in pairs]
        if max(changes, default=0.0) < CLOSE:
            break
    return pairs


def find_pairs(graph: Graph) -> list[tuple[Conv | Linear, Conv | Linear]]:
    """Return the pairs of layers between which c x always becomes c y, for every c > 0 per channel."""
    consumers = graph.consumers()
    pairs = []
    for index, node in enumerate(graph.nodes):
        reached = index
        while isinstance(node.op, Conv | Linear) and len(consumers[reached + 1]) == 1:
            (reached,) = consumers[reached + 1]
            op = graph.nodes[reached].op
            if isinstance(op, Linear) or (isinstance(op, Conv) and op.groups == 1):
                pairs.append((node.op, op))
            keeps_scale = isinstance(op, AvgPool | GlobalAvgPool | MaxPool | Flatten)
            if not (keeps_scale or (isinstance(op, Relu) and op.ceiling is None)):
                break
    return pairs


def _is_trained(module: nn.Module) -> bool:
    """Return whether none of a layer's own parameters is frozen."""
    return all(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _balance(first: Layer, second: Layer) -> float:
    """Scale the channels between two layers to equal norms; return by how much a scale differs from 1 at most."""
    channels = len(first.weight)
    outgoing = second.weight.view(len(second.weight), channels, -1)  # flattened channels lie one after the other
    norms = first.weight.flatten(1).norm(dim=1), outgoing.transpose(0, 1).flatten(1).norm(dim=1)
    alive = (norms[0] > 0) & (norms[1] > 0)
    scale = torch.where(alive, (norms[1] / norms[0].where(alive, norms[1])).sqrt(), 1.0)
    first.weight.mul_(scale.view(-1, *[1] * (first.weight.dim() - 1)))
    bias: Tensor | None = first.bias
    if bias is not None:
        bias.mul_(scale)
    outgoing.div_(scale[None, :, None])
    return float((scale - 1).abs().amax())
