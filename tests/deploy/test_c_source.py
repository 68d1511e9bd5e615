"""C sources: compiled without warnings, run under sanitizers, and compared with PyTorch."""

import ctypes
import re
import subprocess

import numpy as np
import pytest
import torch
from compilers import find_compiler
from torch import nn

from atmc import models
from atmc.deploy.export.c import tables
from atmc.deploy.export.c.model import model_to_c, simplify_keeping_affines
from atmc.deploy.export.c.source import to_c
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
    run_graph,
)
from atmc.deploy.graph.simplify import simplify
from atmc.pack.weight_forms import Weight

FLAGS = ["-std=c99", "-pedantic", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]


def floats(rng, *shape, zeros=0.5):
    kept = rng.random(shape) >= zeros
    return np.where(kept, rng.standard_normal(shape), 0).astype(np.float32)


def conv(rng, outputs, inputs, kernel, **options):
    return Conv(floats(rng, outputs, inputs, *kernel), floats(rng, outputs), **options)


def affine(rng, channels):
    return Affine(floats(rng, channels, zeros=0.2), floats(rng, channels))


def chain(shape, *ops):
    return Graph(shape, tuple(Node(op, (i,)) for i, op in enumerate(ops)))


def one_op_graphs():
    rng = np.random.default_rng(0)
    ops = [
        conv(rng, 6, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        conv(rng, 8, 2, (3, 3), padding=(1, 1), groups=2),
        conv(rng, 4, 1, (3, 3), stride=(2, 2), padding=(1, 1), groups=4),
        conv(rng, 3, 4, (5, 5), stride=(3, 2), padding=(4, 4), dilation=(2, 1)),
        Conv(np.zeros((2, 4, 1, 1), np.float32), floats(rng, 2)),
        affine(rng, 4),
        Relu(),
        Relu(0.5),
        MaxPool((2, 2), (2, 2)),
        MaxPool((3, 2), (2, 1), (1, 1), (2, 1)),
        MaxPool((3, 3), (2, 2), (1, 1), ceil_mode=True),
        MaxPool((2, 2), (3, 3), (0, 0), ceil_mode=True),
        AvgPool((2, 2), (2, 2), ceil_mode=True),
        AvgPool((3, 2), (2, 2), (1, 1), ceil_mode=True, count_padding=False),
        AvgPool((3, 3), (2, 1), (1, 1), ceil_mode=True),
        GlobalAvgPool(),
        Flatten(),
    ]
    graphs = {f"op{i}": chain((4, 7, 9), op) for i, op in enumerate(ops)}
    graphs["twice"] = Graph((4, 7, 9), (Node(Add(), (0, 0)),))
    graphs["constant"] = Graph(
        (1, 2, 2),
        (*chain((), Flatten()).nodes, Node(Linear(np.zeros((2, 4), np.float32), np.ones(2, np.float32)), (1,))),
    )
    return graphs


def networks():
    rng = np.random.default_rng(1)
    square = {"padding": (1, 1)}
    pooled = chain(
        (3, 9, 9),
        affine(rng, 3),
        conv(rng, 5, 3, (3, 3), **square),
        affine(rng, 5),
        Relu(6.0),
        MaxPool((3, 3), (2, 2), (1, 1)),
        Relu(),
        affine(rng, 5),
        MaxPool((2, 2), (1, 1)),
        conv(rng, 7, 5, (2, 2)),
        Relu(),
        AvgPool((2, 2), (1, 1)),
        Flatten(),
        Linear(floats(rng, 6, 28), floats(rng, 6)),
        Relu(),
        affine(rng, 6),
        Linear(floats(rng, 4, 6), floats(rng, 4)),
    )
    residual = Graph(
        (2, 6, 6),
        (
            Node(conv(rng, 4, 2, (3, 3), **square), (0,), "0.stem*/"),
            Node(conv(rng, 4, 4, (3, 3), **square), (1,), "int"),
            Node(Relu(), (2,), "int"),
            Node(conv(rng, 4, 4, (3, 3), **square), (3,)),
            Node(affine(rng, 4), (4,)),
            Node(Add(), (1, 5)),  # may overwrite value 1
            Node(Relu(), (6,)),
            Node(Relu(0.3), (7,)),  # value 7 is read again later
            Node(conv(rng, 4, 4, (1, 1)), (8,)),
            Node(Add(), (9, 7)),
            Node(Add(), (10, 8)),
            Node(affine(rng, 4), (11,)),
            Node(conv(rng, 3, 4, (3, 3), **square), (12,)),
            Node(conv(rng, 3, 4, (1, 1)), (12,)),
            Node(Add(), (14, 13)),
            Node(GlobalAvgPool(), (15,)),
            Node(Flatten(), (16,)),
            Node(Relu(), (1,)),  # a dead node
            Node(Linear(floats(rng, 5, 3), floats(rng, 5)), (17,)),
        ),
    )
    return {"pooled": pooled, "residual": residual}


def random_graph(seed):
    """Draw a network of maps of one shape, some of them read again later, with a pooling at the end."""
    rng = np.random.default_rng(seed)
    nodes = [Node(conv(rng, 3, 3, (3, 3), padding=(1, 1)), (0,))]
    for _ in range(10):
        at = [int(value) for value in rng.integers(max(0, len(nodes) - 3), len(nodes) + 1, 2)]
        ops = [
            conv(rng, 3, 3, (3, 3), padding=(1, 1)),
            affine(rng, 3),
            Relu(),
            Relu(1.0),
            MaxPool((3, 3), (1, 1), (1, 1)),
        ]
        op = Add() if rng.random() < 0.4 else ops[rng.integers(len(ops))]
        nodes.append(Node(op, tuple(at) if isinstance(op, Add) else (at[0],)))
    nodes += [Node(GlobalAvgPool(), (len(nodes),)), Node(Add(), (len(nodes) + 1, len(nodes) + 1))]
    return Graph((3, 5, 4), tuple(nodes))


GRAPHS = one_op_graphs() | networks() | {f"drawn{seed}": random_graph(seed) for seed in range(20)}


def write(source, folder):
    for name, text in ((".h", source.header), (".c", source.source), ("_test.c", source.test_source)):
        (folder / f"{source.name}{name}").write_text(text)


def compile_sources(folder, names, *flags):
    done = subprocess.run(
        [find_compiler("C"), *FLAGS, *flags, *names], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:3000]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    for name, graph in GRAPHS.items():
        write(to_c(graph, name=name), folder)
    return folder


@pytest.fixture(scope="module")
def library(sources):
    compile_sources(sources, [f"{name}.c" for name in GRAPHS], "-shared", "-fPIC", "-o", "all.so")
    return ctypes.CDLL(str(sources / "all.so"))


def logits_of(library, name, images, classes):
    pointer = ctypes.POINTER(ctypes.c_float)
    logits = np.zeros((len(images), classes), np.float32)
    for image, row in zip(np.ascontiguousarray(images), logits, strict=True):
        getattr(library, f"{name}_run")(image.ctypes.data_as(pointer), row.ctypes.data_as(pointer))
        assert getattr(library, f"{name}_classify")(image.ctypes.data_as(pointer)) == row.argmax()
    return logits


@pytest.mark.parametrize("name", GRAPHS)
def test_c_computes_what_torch_computes(library, name):
    graph = GRAPHS[name]
    images = torch.from_numpy(np.random.default_rng(2).standard_normal((3, *graph.input_shape)).astype(np.float32))
    before = images.clone()
    expected = run_graph(graph, images).flatten(1)
    logits = logits_of(library, name, images.numpy(), expected.shape[1])
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-5, atol=1e-5 * max(1, expected.abs().max().item()))
    assert torch.equal(images, before)


def test_generated_test_vectors_pass_under_sanitizers(sources):
    mains = "".join(f"int {name}_main(void);\n" for name in GRAPHS)
    calls = " | ".join(f"{name}_main()" for name in GRAPHS)
    (sources / "main.c").write_text(f"{mains}int main(void) {{ return {calls}; }}\n")
    for name in GRAPHS:
        text = (sources / f"{name}_test.c").read_text().replace("main(void)", f"{name}_main(void)")
        (sources / f"{name}_main.c").write_text(f"int {name}_main(void);\n{text}")
    names = ["main.c", *(f"{name}{end}.c" for name in GRAPHS for end in ("", "_main"))]
    compile_sources(sources, names, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-o", "all")
    done = subprocess.run([sources / "all"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok: ") == len(GRAPHS)


def test_a_wrong_logit_fails_the_generated_test(tmp_path):
    rng = np.random.default_rng(0)
    bias = floats(rng, 3)
    weight = floats(rng, 3, 4)
    right, wrong = (
        to_c(chain((1, 2, 2), Flatten(), Linear(weight, bias + error)), name="m") for error in (0, np.float32(0.1))
    )
    write(right, tmp_path)
    (tmp_path / "m.c").write_text(wrong.source)
    compile_sources(tmp_path, ["m.c", "m_test.c"], "-o", "m")
    done = subprocess.run([tmp_path / "m"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "WRONG" in done.stdout
    assert "expected" in done.stdout


def test_labels_of_any_text(tmp_path):
    labels = ['say "7"\\\n', "Möwe ??/"]
    write(to_c(chain((2, 1, 1), Relu()), name="birds", labels=labels), tmp_path)
    compile_sources(tmp_path, ["birds.c"], "-shared", "-fPIC", "-o", "birds.so")
    compiled_labels = (ctypes.c_char_p * 2).in_dll(ctypes.CDLL(str(tmp_path / "birds.so")), "birds_labels")
    assert [text.decode() for text in compiled_labels] == labels


def lenet_graph(model):
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    pool = MaxPool((2, 2), (2, 2))
    ops = [
        Conv(state["conv1.weight"], state["conv1.bias"]),
        pool,
        Relu(),
        Conv(state["conv2.weight"], state["conv2.bias"]),
        pool,
        Relu(),
        Flatten(),
        Linear(state["fc1.weight"], state["fc1.bias"]),
        Relu(),
        Linear(state["fc2.weight"], state["fc2.bias"]),
    ]
    return chain((1, 28, 28), *ops)


def test_memory_of_lenet_is_two_maps_and_the_larger_plane():
    """conv1 needs its pooled map 20x12x12 and a plane 24x24; conv2 needs 20x12x12, 50x4x4 and 8x8."""
    graph = lenet_graph(models.build("lenet", 10, seed=0))
    source = to_c(graph)
    assert source.arena_bytes == 4 * max(2880 + 576, 2880 + 800 + 64, 800 + 500, 510)
    assert f"#define MODEL_ARENA_BYTES {source.arena_bytes}\n" in source.header
    assert f"#define MODEL_TABLE_BYTES {source.table_bytes}\n" in source.header
    assert not re.search(r"malloc|math\.h|double", source.source)
    assert source == to_c(graph)


def test_a_residual_block_needs_two_maps_and_a_plane():
    rng = np.random.default_rng(0)
    same = [conv(rng, 4, 4, (3, 3), padding=(1, 1)) for _ in range(3)]
    nodes = (Node(same[0], (0,)), Node(same[1], (1,)), Node(Relu(), (2,)), Node(same[2], (3,)), Node(Add(), (4, 1)))
    assert to_c(Graph((4, 8, 8), nodes)).arena_bytes == 4 * (2 * 4 * 64 + 64)


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        # all zeros; one nonzero at the front: 1 bit of Rice, no code; its value in float16, then in float32
        (np.zeros((2, 3)), 0),
        (np.eye(1, 8), 1 + 2),
        (np.eye(1, 8) * 0.1, 1 + 4),
        # 64 nonzeros of 2 values, no zeros: 64 bits of Rice, 64 of codes, one level in float16, one in float32
        (np.tile([0.5, 0.1], 32)[None], 16 + 2 + 4),
        # 64 different values in float16: a table of levels would be longer
        (np.arange(1, 65)[None], (64 + 64 * 16) // 8),
        (np.arange(1, 65)[None] / 3, (64 + 64 * 32) // 8),
    ],
)
def test_bytes_of_a_table(rows, size):
    assert tables.encode(rows.astype(np.float32)).size == size


def test_rice_code_by_hand():
    """The zeros before the nonzeros are 5, 0, 6; with rice 2 the codes are 10 10, 0 00 and 10 01, lowest bit first."""
    row = np.zeros((1, 14), np.float32)
    row[0, [5, 6, 13]] = 1
    table = tables.encode(row)
    bits = {1: "110 10 01110 0", 2: "10 100 0010 01"}[table.rice].replace(" ", "")
    assert "".join(f"{byte:08b}"[::-1] for byte in table.stream).rstrip("0") == bits.rstrip("0")
    assert (table.count, table.bits, table.halves, table.floats) == (3, 0, (0x3C00,), ())


def test_values_of_every_kind_arrive_exactly(tmp_path):
    """The values include subnormals, the ends of float16 and float32, and zeros of both signs."""
    values = [6e-8, -(2.0**-24), 2.0**-14, 65504.0, -65520.0, 3e38, 1e-40, -0.0, 0.0, 1 / 3]
    few = np.array(values, np.float32)
    halves = np.arange(1, 1025, dtype=np.float32) / 1024 * np.where(np.arange(1024) % 3, 1, -1)
    halves = halves.astype(np.float32)
    graphs = {"few": few, "many": np.tile(few, 50), "halves": halves, "whole": 1 / halves}
    for name, scale in graphs.items():
        op = Affine(scale, np.zeros(len(scale), np.float32))
        write(to_c(chain((len(scale), 1, 1), op), name=name), tmp_path)
    compile_sources(tmp_path, [f"{name}.c" for name in graphs], "-shared", "-fPIC", "-o", "all.so")
    library = ctypes.CDLL(str(tmp_path / "all.so"))
    for name, scale in graphs.items():
        logits = logits_of(library, name, np.ones((1, len(scale), 1, 1), np.float32), len(scale))
        np.testing.assert_array_equal(logits[0], scale)


def test_batch_norm_stays_apart_if_that_is_smaller():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 64, 3),
    ).eval()
    with torch.no_grad():
        for weight in (net[0].weight, net[4].weight):
            weight.copy_(torch.randint(-1, 2, weight.shape))
        net[0].weight[:4] = 0  # four dead channels
        net[1].weight.uniform_(0.5, 1.5)
    images = torch.rand(4, 1, 8, 8)
    apart = simplify_keeping_affines(net, (1, 8, 8))
    assert apart.nodes[0].op.weight.shape == (12, 1, 3, 3)
    torch.testing.assert_close(run_graph(apart, images), net(images).detach(), rtol=1e-5, atol=1e-4)
    source = model_to_c(net, (1, 8, 8))
    assert source == to_c(apart)
    assert source.table_bytes < to_c(simplify(net, (1, 8, 8))).table_bytes


@pytest.mark.parametrize("name", ["", "2d", "my-model", "é", "a b"])
def test_a_name_that_c_cannot_have(name):
    with pytest.raises(ValueError, match="expected a name that is an identifier of C"):
        to_c(GRAPHS["op6"], name=name)


def test_invalid_input_is_refused():
    graph = chain((2, 1, 1), Relu())
    with pytest.raises(ValueError, match="expected 2 labels, one per class, got 1"):
        to_c(graph, labels=["a"])
    with pytest.raises(ValueError, match="at least one operation"):
        to_c(Graph((2, 1, 1), ()))
    with pytest.raises(ValueError, match="expected weights to be finite"):
        to_c(chain((2, 1, 1), Affine(np.array([1, np.nan], np.float32), np.zeros(2, np.float32))))


def test_factors_are_used_if_their_tables_are_smaller():
    u, v, c = np.zeros((64, 1), np.float32), np.zeros((1, 64), np.float32), np.zeros((64, 64), np.float32)
    rng = np.random.default_rng(0)
    u[:12, 0], v[0, :12], c[0, 63] = rng.random(12), rng.random(12), 0.5  # 144 nonzeros of W, 25 of the factors
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64)).eval()
    weight = Weight("svd", (64, 64), {"U": u, "V": v, "C": c})
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(weight.value()))
    source = model_to_c(model, (1, 8, 8), {"1.weight": weight})
    assert len(simplify(model, (1, 8, 8), {"1.weight": weight}).nodes) == 2  # in Python W is less work
    assert source.table_bytes < model_to_c(model, (1, 8, 8)).table_bytes
