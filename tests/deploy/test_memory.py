"""The memory planner: no two buffers that are in use at once overlap, and known cases take the least memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atmc.deploy.graph.graph import Add, Flatten, Graph, Node, Relu
from atmc.deploy.graph.memory import Buffer, last_reads, place_buffers
from atmc.deploy.graph.rewrite import remove_dead_nodes

buffers = st.builds(
    lambda size, first, length: Buffer(size, first, first + length),
    st.integers(1, 40),
    st.integers(0, 9),
    st.integers(0, 5),
)


@given(st.lists(buffers, max_size=12), st.sampled_from([1, 4, 16]))
def test_buffers_in_use_at_once_do_not_overlap(requests, alignment):
    offsets, size = place_buffers(requests, alignment=alignment)
    used = np.zeros((20, size), int)
    for buffer, offset in zip(requests, offsets, strict=True):
        assert offset % alignment == 0
        used[buffer.first : buffer.last + 1, offset : offset + buffer.size] += 1
    assert used.max(initial=0) <= 1
    assert size % alignment == 0
    assert size >= max((sum(b.size for b in requests if b.first <= step <= b.last) for step in range(20)), default=0)


@pytest.mark.parametrize(
    ("requests", "offsets", "size"),
    [
        ([], [], 0),
        ([Buffer(3, 0, 0), Buffer(3, 1, 1)], [0, 0], 3),
        ([Buffer(3, 0, 1), Buffer(3, 1, 1)], [0, 3], 6),
        ([Buffer(2, 0, 1), Buffer(5, 1, 2), Buffer(4, 2, 3)], [5, 0, 5], 9),
        ([Buffer(5, 0, 2), Buffer(3, 0, 0), Buffer(4, 0, 2), Buffer(2, 1, 1)], [0, 9, 5, 9], 12),
    ],
)
def test_places_by_hand(requests, offsets, size):
    assert place_buffers(requests) == (offsets, size)


def test_last_reads():
    assert last_reads([(0,), (0, 1), (2,), (1,)]) == {0: 1, 1: 3, 2: 2}


def test_dead_nodes_are_removed_and_values_renumbered():
    nodes = (
        Node(Relu(), (0,), "a"),
        Node(Relu(), (1,), "dead"),
        Node(Add(), (1, 0), "b"),
        Node(Flatten(), (3,), "c"),
        Node(Flatten(), (1,), "after the output"),
    )
    live = remove_dead_nodes(Graph((1, 2, 2), nodes), 4)
    assert [(node.name, node.inputs) for node in live.nodes] == [("a", (0,)), ("b", (1, 0)), ("c", (2,))]
    assert remove_dead_nodes(live) == live
    assert remove_dead_nodes(live, 0).nodes == ()
