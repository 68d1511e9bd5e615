"""Which operations share one loop over channels, and where in the arena their results lie.

A stage is a convolution, a linear layer or nothing, followed by scales, ReLUs, additions and at most one pooling. It
is computed channel by channel: what is pooled lies in one scratch plane, never as a whole map.
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
class Step:
    """One operation on a channel. before, after: shapes of the whole value. other: what an Add adds."""

    op: Affine | Relu | Add | Pool
    before: Shape
    after: Shape
    other: int | None = None


@dataclass(frozen=True, eq=False)
class Stage:
    """start (None: a copy of the source), then steps. source, other, result: values of the graph, views resolved."""

    start: Conv | Linear | None
    source: int
    source_shape: Shape
    started: Shape
    steps: tuple[Step, ...]
    result: int
    names: tuple[str, ...]

    @property
    def shape(self) -> Shape:
        return self.steps[-1].after if self.steps else self.started

    @property
    def others(self) -> list[int]:
        return [step.other for step in self.steps if step.other is not None]

    @property
    def pooled(self) -> bool:
        return any(isinstance(step.op, POOLS) for step in self.steps)


@dataclass(frozen=True)
class Plan:
    """Offsets and size in floats. in_place: the earlier value over which a stage writes, None where there is none."""

    stages: tuple[Stage, ...]
    offsets: dict[int, int]
    planes: tuple[int | None, ...]
    in_place: tuple[int | None, ...]
    output: int
    floats: int


def make_plan(graph: Graph) -> Plan:
    """Stages in order, and an arena in which no two values that are needed at once overlap."""
    stages, output = find_stages(graph)
    last = last_reads([*((stage.source, *stage.others) for stage in stages), (output,)])
    buffers: list[Buffer] = []
    numbers: dict[int, int] = {}  # value -> its buffer
    planes: list[int | None] = []
    in_place = []
    for index, stage in enumerate(stages):
        over = _written_over(stage, index, last)
        in_place.append(over)
        if over is None:
            numbers[stage.result] = len(buffers)
            buffers.append(Buffer(math.prod(stage.shape), index, last[stage.result]))
        else:
            numbers[stage.result] = numbers[over]
            buffers[numbers[over]] = replace(buffers[numbers[over]], last=last[stage.result])
        size = plane_size(stage, over)
        planes.append(len(buffers) if size else None)
        buffers += [Buffer(size, index, index)] if size else []
    offsets, size = place_buffers(buffers)
    return Plan(
        stages=tuple(stages),
        offsets={value: offsets[number] for value, number in numbers.items()},
        planes=tuple(None if number is None else offsets[number] for number in planes),
        in_place=tuple(in_place),
        output=output,
        floats=size,
    )


def find_stages(graph: Graph) -> tuple[list[Stage], int]:
    """The stages in an order in which they can run, and the value of the last; nodes without effect left out."""
    graph = remove_dead_nodes(graph)
    shapes, readers = graph.shapes(), graph.consumers()
    output = len(graph.nodes)
    root = list(range(output + 1))
    found: dict[int, Stage] = {}
    taken: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if index in taken:
            continue
        if isinstance(node.op, Flatten):
            root[index + 1] = root[node.inputs[0]]
            continue
        chain = _chain(graph, index, readers, taken)
        taken.update(chain)
        found[chain[-1]] = _stage([graph.nodes[i] for i in chain], chain, shapes, root)
    stages = [found[index] for index in sorted(found)]
    if root[output] == IMAGE:
        stages.append(Stage(None, IMAGE, shapes[IMAGE], shapes[IMAGE], (), output, ("copy",)))
        return stages, output
    return stages, root[output]


def plane_size(stage: Stage, over: int | None) -> int:
    """Floats of the scratch plane of a stage, 0 where it works in its result."""
    if not stage.pooled:
        return math.prod(stage.shape[1:]) if over in stage.others else 0
    if stage.start is None and isinstance(stage.steps[0].op, POOLS):
        return 0
    return math.prod(stage.started[1:])


def _chain(graph: Graph, index: int, readers: Sequence[Sequence[int]], taken: set[int]) -> list[int]:
    """Free nodes from `index` on of which each is read by the next alone, as far as they fit one stage."""
    chain = [index]
    pooled = isinstance(graph.nodes[index].op, POOLS)
    while len(readers[chain[-1] + 1]) == 1:
        (following,) = readers[chain[-1] + 1]
        op = graph.nodes[following].op
        ends = isinstance(op, Conv | Linear | Flatten) or (pooled and isinstance(op, POOLS))
        if ends or following in taken:
            break
        pooled = pooled or isinstance(op, POOLS)
        chain.append(following)
    return chain


def _stage(nodes: Sequence[Node], chain: Sequence[int], shapes: Sequence[Shape], root: Sequence[int]) -> Stage:
    first = nodes[0]
    start = first.op if isinstance(first.op, Conv | Linear) else None
    source = first.inputs[0]
    started = shapes[source if start is None else chain[0] + 1]
    steps = []
    value = source if start is None else chain[0] + 1
    for node, index in list(zip(nodes, chain, strict=True))[0 if start is None else 1 :]:
        other = None
        if isinstance(node.op, Add):
            a, b = node.inputs
            other = root[b if a == value else a]
        assert isinstance(node.op, Affine | Relu | Add | Pool)
        steps.append(Step(node.op, shapes[value], shapes[index + 1], other))
        value = index + 1
    names = tuple(node.name for node in nodes if node.name)
    return Stage(start, root[source], shapes[source], started, tuple(steps), value, names)


def _written_over(stage: Stage, index: int, last: dict[int, int]) -> int | None:
    """A value of the result's shape that nobody reads after this stage, and that it reads channel by channel."""
    if stage.pooled:
        return None
    candidates = [value for value in stage.others if value != stage.source]
    if stage.start is None and stage.source not in stage.others:
        candidates.insert(0, stage.source)
    return next((value for value in candidates if value != IMAGE and last[value] == index), None)
