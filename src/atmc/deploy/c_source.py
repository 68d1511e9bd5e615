"""A network as one C99 source and its header, for machines without Python, an operating system or much memory.

No heap, no libm, no file: constant tables (`c_tables`), a static arena (`c_plan`), float32 arithmetic. The image is the
caller's and is only read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from atmc.deploy import c_plan, c_runtime, c_tables
from atmc.deploy.c_plan import Plan, Stage, Step
from atmc.deploy.c_tables import literal
from atmc.deploy.graph import Add, Affine, AvgPool, Conv, Floats, Graph, Linear, MaxPool, Relu, evaluate

_TEST_IMAGES = 4
_TOLERANCE = 1e-4  # of the largest |logit|


@dataclass(frozen=True)
class CSource:
    """NAME.h, NAME.c, and NAME_test.c, a program that exits with 1 where the logits are not as expected.

    table_bytes: constant data. arena_bytes: static memory; the stack and the caller's image come on top.
    """

    name: str
    header: str
    source: str
    test_source: str
    table_bytes: int
    arena_bytes: int


def to_c(graph: Graph, *, name: str = "model", labels: Sequence[str] | None = None) -> CSource:
    """The C source of a network.

    Batch norm that is left as Affine nodes behind convolutions keeps codebooks whole, hence tables small; multiplied
    into the weights it makes nearly every weight a value of its own.

    Args:
        name: prefix of the C functions and constants, and of the file names.
        labels: names of the classes, for NAME_labels.

    Raises:
        ValueError: the name is not an identifier of C, the labels are not one for each class, a weight is not finite,
            or the graph has no operation or does not fit together.

    >>> from atmc.deploy.graph import Flatten, Node
    >>> fc = Linear(np.eye(2, 4, dtype=np.float32), np.zeros(2, np.float32))
    >>> made = to_c(Graph((1, 2, 2), (Node(Flatten(), (0,)), Node(fc, (1,)))), name="tiny")
    >>> made.table_bytes, made.arena_bytes
    (3, 8)
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"expected a name that is an identifier of C, got {name!r:.80}")
    if not graph.nodes:
        raise ValueError("expected a network of at least one operation")
    classes = math.prod(graph.shapes()[-1])
    if labels is not None and len(labels) != classes:
        raise ValueError(f"expected {classes} labels, one for each class, got {len(labels)}")
    plan = c_plan.make_plan(graph)
    texts = [_Writer(stage, index, plan) for index, stage in enumerate(plan.stages)]
    table_bytes, arena_bytes = sum(text.table_bytes for text in texts), 4 * plan.floats
    sizes = {
        "CHANNELS": graph.input_shape[0],
        "HEIGHT": graph.input_shape[1],
        "WIDTH": graph.input_shape[2],
        "CLASSES": classes,
        "TABLE_BYTES": table_bytes,
        "ARENA_BYTES": arena_bytes,
    }
    header = _header(name, sizes, labels is not None)
    source = _source(name, plan, texts, labels)
    return CSource(name, header, source, _test_source(name, graph, classes), table_bytes, arena_bytes)


def _header(name: str, sizes: dict[str, int], labelled: bool) -> str:
    upper = name.upper()
    constants = "".join(f"#define {upper}_{word} {size}\n" for word, size in sizes.items())
    labels = f"extern const char *const {name}_labels[{upper}_CLASSES];\n" if labelled else ""
    return f"""/* Made by atmc export --to c. Not to be edited. */
#ifndef {upper}_H
#define {upper}_H

{constants}
#ifdef __cplusplus
extern "C" {{
#endif

/* image: {upper}_CHANNELS x {upper}_HEIGHT x {upper}_WIDTH floats, channel by channel and row by row, in [0, 1].
   Neither function may run twice at a time: both work in one static arena. */
void {name}_run(const float *image, float *logits); /* logits: {upper}_CLASSES floats */
int {name}_classify(const float *image);            /* the class of the largest logit, from 0 */
{labels}
#ifdef __cplusplus
}}
#endif

#endif
"""


def _source(name: str, plan: Plan, texts: Sequence[_Writer], labels: Sequence[str] | None) -> str:
    upper = name.upper()
    functions = [text.function for text in texts]
    calls = "".join(f"    {text.call}\n" for text in texts)
    named = ""
    if labels is not None:
        listed = ",\n".join(f"    {_quoted(label)}" for label in labels)
        named = f"\nconst char *const {name}_labels[{upper}_CLASSES] = {{\n{listed}}};\n"
    parameter = "const float *image" if re.search(r"\bimage\b", calls) else "void"
    argument = "image" if parameter != "void" else ""
    unused = "" if argument else "    (void)image;\n"
    return f"""/* Made by atmc export --to c. Not to be edited. */
#include <float.h>
#include <limits.h>
#include <stdint.h>

#include "{name}.h"

#if INT_MAX < 2147483647
#error "int has to have 32 bits"
#endif
{c_runtime.needed(functions)}
{"".join(text.tables for text in texts)}
static float arena[{plan.floats}];
{"".join(functions)}{named}
static const float *forward({parameter})
{{
{calls}    return arena + {plan.offsets[plan.output]};
}}

void {name}_run(const float *image, float *logits)
{{
    const float *found;
    int i;
{unused}    found = forward({argument});
    for (i = 0; i < {upper}_CLASSES; i++)
        logits[i] = found[i];
}}

int {name}_classify(const float *image)
{{
    const float *found;
    int i, best = 0;
{unused}    found = forward({argument});
    for (i = 1; i < {upper}_CLASSES; i++)
        if (found[i] > found[best])
            best = i;
    return best;
}}
"""


class _Writer:
    """C text of one stage: its tables, its function, the call."""

    def __init__(self, stage: Stage, index: int, plan: Plan) -> None:
        self.tables, self.table_bytes = "", 0
        self._label = f"{_identifier(stage)}_{index}"
        self._stage, self._over, self._scratch = stage, plan.in_place[index], plan.planes[index] is not None
        self._locals: list[str] = []
        self._lines: list[str] = []
        self._parameters: dict[str, str] = {}  # declaration -> argument
        self._plan = plan
        start, steps = self._start(), stage.steps
        self._body(start, steps)
        self._parameters["float *out"] = self._address(stage.result)
        if self._scratch:
            self._parameters["float *plane"] = f"arena + {plan.planes[index]}"
        self.call = f"{self._label}({', '.join(self._parameters.values())});"
        self.function = self._function()

    def _function(self) -> str:
        stage = self._stage
        size = math.prod(stage.shape[1:])
        declared = "".join(f"    {line}\n" for line in [*self._locals, "int o;"])
        body = "".join(f"        {line}\n" for line in self._lines)
        return f"""
/* {_described(stage)} */
static void {self._label}({", ".join(self._parameters)})
{{
{declared}    for (o = 0; o < {stage.shape[0]}; o++) {{
        float *result = out + o * {size};
{body}    }}
}}
"""

    def _start(self) -> str:
        """Writes the stage's beginning; the C expression of where the channel now is."""
        stage, size = self._stage, math.prod(self._stage.started[1:])
        work = "plane" if self._scratch else "result"
        match stage.start:
            case None:
                if self._over == stage.source:
                    return work
                self._parameters["const float *in"] = self._address(stage.source)
                if stage.steps and isinstance(stage.steps[0].op, c_plan.POOLS):
                    return f"in + o * {size}"
                self._lines.append(f"copy({work}, {size}, in + o * {size});")
            case Linear() as op:
                bias = self._entry(op.bias, "bias")
                if product := self._table(op.weight, "weight"):
                    self._parameters["const float *in"] = self._address(stage.source)
                    bias += f" + dot(&{product}, {op.weight.shape[1]}, in)"
                self._lines.append(f"{work}[0] = {bias};")
            case Conv() as op:
                self._lines.append(f"fill({work}, {size}, {self._entry(op.bias, 'bias')});")
                self._convolve(op, work)
        return work

    def _convolve(self, op: Conv, work: str) -> None:
        rows = op.weight.reshape(len(op.weight), -1)
        if not (weight := self._table(rows, "weight")):
            return
        self._parameters["const float *in"] = self._address(self._stage.source)
        height, width = self._stage.source_shape[1:]
        outputs, inputs = len(rows) // op.groups, op.weight.shape[1]
        group = "" if op.groups == 1 else f" + o / {outputs} * {inputs * height * width}"
        kernel = self._window("kernel", *op.weight.shape[2:], *op.stride, *op.padding, *op.dilation)
        sides = f"{self._stage.started[1]}, {self._stage.started[2]}"
        self._lines.append(
            f"convolve(&{weight}, {rows.shape[1]}, in{group}, {height}, {width}, {kernel}, {work}, {sides});"
        )

    def _body(self, work: str, steps: Sequence[Step]) -> None:
        for number, step in enumerate(steps):
            size = math.prod(step.before[1:])
            match step.op:
                case Affine() as op:
                    scale, shift = self._entry(op.scale, f"scale{number}"), self._entry(op.shift, f"shift{number}")
                    self._locals += [f"float by{number}, plus{number};"]
                    self._lines += [f"by{number} = {scale};", f"plus{number} = {shift};"]
                    self._lines.append(f"affine({work}, {size}, by{number}, plus{number});")
                case Relu(ceiling):
                    self._lines.append(f"relu({work}, {size});")
                    if ceiling is not None:
                        self._lines.append(f"limit({work}, {size}, {literal(ceiling)});")
                case Add():
                    assert step.other is not None
                    other = f"other{number}"
                    if step.other == self._over:
                        other = "out"
                    else:
                        self._parameters[f"const float *{other}"] = self._address(step.other)
                    self._lines.append(f"add({work}, {size}, {other} + o * {size});")
                case _:
                    self._pool(step, work)
                    work = "result"
        if work == "plane":
            self._lines.append(f"copy(result, {math.prod(self._stage.shape[1:])}, plane);")

    def _pool(self, step: Step, work: str) -> None:
        height, width = step.before[1:]
        sides = f"result, {step.after[1]}, {step.after[2]}"
        match step.op:
            case MaxPool(kernel, stride, padding, dilation):
                pool = self._window("pool", *kernel, *stride, *padding, *dilation)
                self._lines.append(f"max_pool({work}, {height}, {width}, {pool}, {sides});")
            case AvgPool(kernel, stride, padding):
                pool = self._window("pool", *kernel, *stride, *padding, 1, 1)
                counted = int(step.op.count_padding)
                self._lines.append(f"avg_pool({work}, {height}, {width}, {pool}, {counted}, {sides});")
            case _:
                self._lines.append(f"result[0] = mean({work}, {height * width});")

    def _window(self, label: str, *numbers: int) -> str:
        self._locals.append(f"static const window {label} = {{{', '.join(map(str, numbers))}}};")
        return f"&{label}"

    def _entry(self, values: Floats, label: str) -> str:
        """C expression of one value a channel."""
        table = self._table(values.reshape(-1, 1), label)
        return f"entry(&{table})" if table else "0.0f"

    def _table(self, matrix: Floats, label: str) -> str:
        """The name of an opened table, "" for a matrix of zeros."""
        table = c_tables.encode(matrix)
        if not table.count:
            return ""
        name = f"{self._label}_{label}"
        self.tables += c_tables.declare(table, name)
        self.table_bytes += table.size
        self._locals.append(f"table {label} = {c_tables.opened(table, name)};")
        return label

    def _address(self, value: int) -> str:
        return "image" if value == c_plan.IMAGE else f"arena + {self._plan.offsets[value]}"


def _test_source(name: str, graph: Graph, classes: int) -> str:
    """A program that runs images of noise, drawn here and there by the same generator, and compares the logits."""
    upper, pixels = name.upper(), math.prod(graph.input_shape)
    state, drawn = 1, []
    for _ in range(_TEST_IMAGES * pixels):
        state = (state * 1664525 + 1013904223) % 2**32
        drawn.append(state >> 24)
    images = np.array(drawn, np.float32).reshape(_TEST_IMAGES, *graph.input_shape) / np.float32(255)
    with torch.no_grad():
        logits = evaluate(graph, torch.from_numpy(images).double()).reshape(_TEST_IMAGES, classes)
    rows = ",\n".join("    {" + ", ".join(literal(x) for x in row) + "}" for row in logits.tolist())
    tolerance = literal(max(_TOLERANCE * logits.abs().max().item(), 1e-30))
    return f"""/* Made by atmc export --to c: compares {name}.c with PyTorch on {_TEST_IMAGES} images of noise. */
#include <stdint.h>
#include <stdio.h>

#include "{name}.h"

static const float expected[{_TEST_IMAGES}][{upper}_CLASSES] = {{
{rows}}};

static float image[{upper}_CHANNELS * {upper}_HEIGHT * {upper}_WIDTH];
static float logits[{upper}_CLASSES];

int main(void)
{{
    uint32_t state = 1;
    int n, i, wrong = 0;
    for (n = 0; n < {_TEST_IMAGES}; n++) {{
        int best = 0;
        for (i = 0; i < {upper}_CHANNELS * {upper}_HEIGHT * {upper}_WIDTH; i++) {{
            state = state * 1664525u + 1013904223u;
            image[i] = (float)(state >> 24) / 255.0f;
        }}
        {name}_run(image, logits);
        for (i = 0; i < {upper}_CLASSES; i++) {{
            const float difference = logits[i] - expected[n][i];
            if (!(difference <= {tolerance} && difference >= -{tolerance})) {{
                printf("image %d, logit %d: %g, expected %g\\n", n, i, (double)logits[i], (double)expected[n][i]);
                wrong = 1;
            }}
            if (logits[i] > logits[best])
                best = i;
        }}
        if ({name}_classify(image) != best) {{
            printf("image %d: {name}_classify and {name}_run do not agree\\n", n);
            wrong = 1;
        }}
    }}
    printf("%s: tables %d bytes, arena %d bytes\\n", wrong ? "WRONG" : "ok", {upper}_TABLE_BYTES, {upper}_ARENA_BYTES);
    return wrong;
}}
"""


def _identifier(stage: Stage) -> str:
    kind = "map" if stage.start is None else type(stage.start).__name__.lower()
    clean = re.sub(r"[^A-Za-z0-9]+", "_", stage.names[0] if stage.names else "").strip("_")[:40]
    return clean if clean and not clean[0].isdigit() else f"{kind}{'_' if clean else ''}{clean}"


def _described(stage: Stage) -> str:
    kinds = ([] if stage.start is None else [stage.start]) + [step.op for step in stage.steps]
    what = ", ".join(type(op).__name__ for op in kinds) or "copy"
    sides = ["x".join(map(str, shape)) for shape in (stage.source_shape, stage.shape)]
    names = ", ".join(re.sub(r"[^\w.\-]", "_", name, flags=re.ASCII) for name in stage.names)
    return f"{names}{': ' if names else ''}{what}; {sides[0]} to {sides[1]}"


def _quoted(text: str) -> str:
    """A constant of C for any text, as UTF-8."""
    plain = re.compile(rb"[A-Za-z0-9 ,.;:_+\-/()]")
    data = text.encode()
    return '"' + "".join(chr(b) if plain.fullmatch(bytes([b])) else f"\\{b:03o}" for b in data) + '"'
