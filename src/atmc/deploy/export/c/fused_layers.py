"""Fuse operations into layers that run as one loop over channels, and place their results in the arena.

A fused layer is a convolution, a linear layer or a copy, followed by scales, ReLUs, additions and at most one pooling.
It is computed channel by channel: the map before the pooling is kept for one channel only, in a scratch plane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from atmc.deploy.graph.graph import (
    Add,
    Affine,
    AvgPool,
    Conv,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Node,
    Relu,
    Shape,
)
from atmc.deploy.graph.memory import Buffer, last_reads, place_buffers
from atmc.deploy.graph.rewrite import remove_dead_nodes

Pool = MaxPool | AvgPool | GlobalAvgPool
POOLS = (MaxPool, AvgPool, GlobalAvgPool)
IMAGE = 0  # the value that is the caller's image


@dataclass(frozen=True, eq=False)
class ChannelOp:
    """One operation on each channel; before, after: shapes of the whole value; other: the value that an Add adds."""

    op: Affine | Relu | Add | Pool
    before: Shape
    after: Shape
    other: int | None = None


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """Operations that run as one loop over channels.

    Args:
        start: the first operation; None copies the source.
        source, source_shape: the value that it reads.
        start_shape: of what it computes.
        channel_ops: what follows, in order.
        result: the value that the layer writes.
        names: of the modules that the operations came from.
    """

    start: Conv | Linear | None
    source: int
    source_shape: Shape
    start_shape: Shape
    channel_ops: tuple[ChannelOp, ...]
    result: int
    names: tuple[str, ...]

    @property
    def shape(self) -> Shape:
        """The shape of the result."""
        return self.channel_ops[-1].after if self.channel_ops else self.start_shape

    @property
    def others(self) -> list[int]:
        """The values that additions of the layer add."""
        return [step.other for step in self.channel_ops if step.other is not None]

    @property
    def pooled(self) -> bool:
        """Whether the layer has a pooling."""
        return any(isinstance(step.op, POOLS) for step in self.channel_ops)


@dataclass(frozen=True)
class PlacedLayers:
    """Fused layers with their places in the arena; offsets and sizes in floats.

    Args:
        layers: in the order in which they run.
        offsets: of every value that is written.
        planes: of each layer, the offset of its scratch plane if it has one.
        overwritten: of each layer, the earlier value in whose place it writes its result, if any.
        output: the value that is the logits.
        arena_floats: size of the arena.
    """

    layers: tuple[FusedLayer, ...]
    offsets: dict[int, int]
    planes: tuple[int | None, ...]
    overwritten: tuple[int | None, ...]
    output: int
    arena_floats: int


def place_layers(graph: Graph) -> PlacedLayers:
    """Fuse the operations of a graph into layers, and place their results in an arena."""
    layers, output = _fuse_layers(graph)
    last = last_reads([*((layer.source, *layer.others) for layer in layers), (output,)])
    buffers: list[Buffer] = []
    buffer_of: dict[int, int] = {}
    planes: list[int | None] = []
    overwritten = []
    for index, layer in enumerate(layers):
        over = _find_overwritten(layer, index, last)
        overwritten.append(over)
        if over is None:
            buffer_of[layer.result] = len(buffers)
            buffers.append(Buffer(math.prod(layer.shape), index, last[layer.result]))
        else:
            buffer_of[layer.result] = buffer_of[over]
            buffers[buffer_of[over]] = replace(buffers[buffer_of[over]], last=last[layer.result])
        size = _plane_size(layer, over)
        planes.append(len(buffers) if size else None)
        buffers += [Buffer(size, index, index)] if size else []
    offsets, arena_floats = place_buffers(buffers)
    return PlacedLayers(
        layers=tuple(layers),
        offsets={value: offsets[buffer] for value, buffer in buffer_of.items()},
        planes=tuple(None if buffer is None else offsets[buffer] for buffer in planes),
        overwritten=tuple(overwritten),
        output=output,
        arena_floats=arena_floats,
    )


def _fuse_layers(graph: Graph) -> tuple[list[FusedLayer], int]:
    """Return the layers in an order in which they can run, and the value that is the logits.

    A flattening costs nothing: its value is another view of the one that it reads.
    """
    graph = remove_dead_nodes(graph)
    shapes, consumers = graph.shapes(), graph.consumers()
    output = len(graph.nodes)
    stored = list(range(output + 1))  # of every value, the value whose numbers it has
    layers: dict[int, FusedLayer] = {}
    fused: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if index in fused:
            continue
        if isinstance(node.op, Flatten):
            stored[index + 1] = stored[node.inputs[0]]
            continue
        chain = _find_chain(graph, index, consumers, fused)
        fused.update(chain)
        layers[chain[-1]] = _build_layer([graph.nodes[i] for i in chain], chain, shapes, stored)
    ordered = [layers[index] for index in sorted(layers)]
    if stored[output] == IMAGE:
        copy = FusedLayer(
            start=None,
            source=IMAGE,
            source_shape=shapes[IMAGE],
            start_shape=shapes[IMAGE],
            channel_ops=(),
            result=output,
            names=("copy",),
        )
        return [*ordered, copy], output
    return ordered, stored[output]


def _plane_size(layer: FusedLayer, over: int | None) -> int:
    """Return the floats of a layer's scratch plane, 0 if it computes in its result."""
    if not layer.pooled:
        return math.prod(layer.shape[1:]) if over in layer.others else 0
    if layer.start is None and isinstance(layer.channel_ops[0].op, POOLS):
        return 0
    return math.prod(layer.start_shape[1:])


def _find_chain(graph: Graph, index: int, consumers: Sequence[Sequence[int]], fused: set[int]) -> list[int]:
    """Return nodes from `index` on, each read by the next alone, that fit into one layer."""
    chain = [index]
    pooled = isinstance(graph.nodes[index].op, POOLS)
    while len(consumers[chain[-1] + 1]) == 1:
        (following,) = consumers[chain[-1] + 1]
        op = graph.nodes[following].op
        ends = isinstance(op, Conv | Linear | Flatten) or (pooled and isinstance(op, POOLS))
        if ends or following in fused:
            break
        pooled = pooled or isinstance(op, POOLS)
        chain.append(following)
    return chain


def _build_layer(
    nodes: Sequence[Node], chain: Sequence[int], shapes: Sequence[Shape], stored: Sequence[int]
) -> FusedLayer:
    first = nodes[0]
    start = first.op if isinstance(first.op, Conv | Linear) else None
    source = first.inputs[0]
    value = source if start is None else chain[0] + 1
    start_shape = shapes[value]
    channel_ops = []
    for node, index in list(zip(nodes, chain, strict=True))[0 if start is None else 1 :]:
        other = None
        if isinstance(node.op, Add):
            a, b = node.inputs
            other = stored[b if a == value else a]
        assert isinstance(node.op, Affine | Relu | Add | Pool)
        channel_ops.append(ChannelOp(node.op, shapes[value], shapes[index + 1], other))
        value = index + 1
    return FusedLayer(
        start=start,
        source=stored[source],
        source_shape=shapes[source],
        start_shape=start_shape,
        channel_ops=tuple(channel_ops),
        result=value,
        names=tuple(node.name for node in nodes if node.name),
    )


def _find_overwritten(layer: FusedLayer, index: int, last: dict[int, int]) -> int | None:
    """Return a value of the result's shape that the layer reads channel by channel and that nothing reads later."""
    if layer.pooled:
        return None
    candidates = [value for value in layer.others if value != layer.source]
    if layer.start is None and layer.source not in layer.others:
        candidates.insert(0, layer.source)
    return next((value for value in candidates if value != IMAGE and last[value] == index), None)
