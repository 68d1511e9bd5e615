"""Export a network as one C99 source and its header, for machines without Python, operating system or much memory.

It uses no heap, no libm and no file: constant tables (`tables`), a static arena (`fused_layers`) and float32
arithmetic. The caller owns the image, which is only read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from atmc.deploy.export.c import runtime
from atmc.deploy.export.c.fused_layers import PlacedLayers, place_layers
from atmc.deploy.export.c.layer_text import LayerText
from atmc.deploy.export.c.tables import literal
from atmc.deploy.graph.graph import Graph, run_graph

_TEST_IMAGES = 4
_TOLERANCE = 1e-4  # of the largest |logit|


@dataclass(frozen=True)
class CSource:
    """The text of NAME.h, NAME.c and NAME_test.c, a program that exits with 1 if the logits are not as expected.

    Args:
        table_bytes: constant data.
        arena_bytes: static memory; the stack and the caller's image come on top.
    """

    name: str
    header: str
    source: str
    test_source: str
    table_bytes: int
    arena_bytes: int


def to_c(graph: Graph, *, name: str = "model", labels: Sequence[str] | None = None) -> CSource:
    """Return the C source of a network.

    Tables are small if batch norms stay Affine nodes, since the weights of a layer then have the few values of their
    codebook; folded into the weights a batch norm makes nearly every weight a distinct value.

    Args:
        graph: the network.
        name: prefix of the C functions and constants, and of the file names.
        labels: names of the classes, for NAME_labels.

    Raises:
        ValueError: the name is not an identifier of C, there is not one label per class, a weight is not finite, or the
            graph has no operation or is not consistent.

    >>> from atmc.deploy.graph.graph import Flatten, Linear, Node
    >>> fc = Linear(np.eye(2, 4, dtype=np.float32), np.zeros(2, np.float32))
    >>> source = to_c(Graph((1, 2, 2), (Node(Flatten(), (0,)), Node(fc, (1,)))), name="tiny")
    >>> source.table_bytes, source.arena_bytes
    (3, 8)
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"expected a name that is an identifier of C, got {name!r:.80}")
    if not graph.nodes:
        raise ValueError("expected a network of at least one operation")
    classes = math.prod(graph.shapes()[-1])
    if labels is not None and len(labels) != classes:
        raise ValueError(f"expected {classes} labels, one per class, got {len(labels)}")
    placed = place_layers(graph)
    texts = [LayerText(index, placed) for index in range(len(placed.layers))]
    table_bytes, arena_bytes = sum(text.table_bytes for text in texts), 4 * placed.arena_floats
    sizes = {
        "CHANNELS": graph.input_shape[0],
        "HEIGHT": graph.input_shape[1],
        "WIDTH": graph.input_shape[2],
        "CLASSES": classes,
        "TABLE_BYTES": table_bytes,
        "ARENA_BYTES": arena_bytes,
    }
    return CSource(
        name=name,
        header=_header(name, sizes, labels is not None),
        source=_source(name, placed, texts, labels),
        test_source=_test_source(name, graph, classes),
        table_bytes=table_bytes,
        arena_bytes=arena_bytes,
    )


def _header(name: str, sizes: dict[str, int], labeled: bool) -> str:
    upper = name.upper()
    constants = "".join(f"#define {upper}_{word} {size}\n" for word, size in sizes.items())
    labels = f"extern const char *const {name}_labels[{upper}_CLASSES];\n" if labeled else ""
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


def _source(name: str, placed: PlacedLayers, texts: Sequence[LayerText], labels: Sequence[str] | None) -> str:
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
{runtime.select_functions(functions)}
{"".join(text.tables for text in texts)}
static float arena[{placed.arena_floats}];
{"".join(functions)}{named}
static const float *forward({parameter})
{{
{calls}    return arena + {placed.offsets[placed.output]};
}}

void {name}_run(const float *image, float *logits)
{{
    const float *output;
    int i;
{unused}    output = forward({argument});
    for (i = 0; i < {upper}_CLASSES; i++)
        logits[i] = output[i];
}}

int {name}_classify(const float *image)
{{
    const float *logits;
    int i, best = 0;
{unused}    logits = forward({argument});
    for (i = 1; i < {upper}_CLASSES; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}}
"""


def _test_source(name: str, graph: Graph, classes: int) -> str:
    """Return a program that compares the logits of noise; the noise is generated here and in C by the same rule."""
    upper, pixels = name.upper(), math.prod(graph.input_shape)
    state, drawn = 1, []
    for _ in range(_TEST_IMAGES * pixels):
        state = (state * 1664525 + 1013904223) % 2**32
        drawn.append(state >> 24)
    images = np.array(drawn, np.float32).reshape(_TEST_IMAGES, *graph.input_shape) / np.float32(255)
    with torch.no_grad():
        logits = run_graph(graph, torch.from_numpy(images).double()).reshape(_TEST_IMAGES, classes)
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


def _quoted(text: str) -> str:
    """Return a string constant of C for any text, as UTF-8."""
    plain = re.compile(rb"[A-Za-z0-9 ,.;:_+\-/()]")
    data = text.encode()
    return '"' + "".join(chr(b) if plain.fullmatch(bytes([b])) else f"\\{b:03o}" for b in data) + '"'
