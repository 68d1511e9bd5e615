"""Write the C text of one fused layer: its tables, a function with one loop over channels, and the call of it."""

from __future__ import annotations

import math
import re

from atmc.deploy.export.c import tables
from atmc.deploy.export.c.fused_layers import IMAGE, POOLS, ChannelOp, FusedLayer, PlacedLayers
from atmc.deploy.graph.graph import Add, Affine, AvgPool, Conv, FloatArray, Linear, MaxPool, Relu


class LayerText:
    """The C text of one layer.

    Attributes:
        tables, function, call: C text.
        table_bytes: memory that the tables take.
    """

    def __init__(self, index: int, placed: PlacedLayers) -> None:
        layer = placed.layers[index]
        self.tables, self.table_bytes = "", 0
        self._label = f"{_identifier(layer)}_{index}"
        self._layer, self._overwritten, self._plane = layer, placed.overwritten[index], placed.planes[index]
        self._locals: list[str] = []
        self._lines: list[str] = []
        self._parameters: dict[str, str] = {}  # declaration -> argument
        self._offsets = placed.offsets
        self._write_channel_ops(self._write_start())
        self._parameters["float *out"] = self._address(layer.result)
        if self._plane is not None:
            self._parameters["float *plane"] = f"arena + {self._plane}"
        self.call = f"{self._label}({', '.join(self._parameters.values())});"
        self.function = self._function_text()

    def _function_text(self) -> str:
        layer = self._layer
        size = math.prod(layer.shape[1:])
        declared = "".join(f"    {line}\n" for line in [*self._locals, "int o;"])
        body = "".join(f"        {line}\n" for line in self._lines)
        return f"""
/* {_describe(layer)} */
static void {self._label}({", ".join(self._parameters)})
{{
{declared}    for (o = 0; o < {layer.shape[0]}; o++) {{
        float *result = out + o * {size};
{body}    }}
}}
"""

    def _write_start(self) -> str:
        """Write the first operation, and return the C expression for where its channel is."""
        layer, size = self._layer, math.prod(self._layer.start_shape[1:])
        work = "result" if self._plane is None else "plane"
        match layer.start:
            case None:
                if self._overwritten == layer.source:
                    return work
                self._parameters["const float *in"] = self._address(layer.source)
                if layer.channel_ops and isinstance(layer.channel_ops[0].op, POOLS):
                    return f"in + o * {size}"
                self._lines.append(f"copy({work}, {size}, in + o * {size});")
            case Linear() as op:
                bias = self._entry(op.bias, "bias")
                if product := self._table(op.weight, "weight"):
                    self._parameters["const float *in"] = self._address(layer.source)
                    bias += f" + dot(&{product}, {op.weight.shape[1]}, in)"
                self._lines.append(f"{work}[0] = {bias};")
            case Conv() as op:
                self._lines.append(f"fill({work}, {size}, {self._entry(op.bias, 'bias')});")
                self._write_convolution(op, work)
        return work

    def _write_convolution(self, op: Conv, work: str) -> None:
        rows = op.weight.reshape(len(op.weight), -1)
        if not (weight := self._table(rows, "weight")):
            return
        self._parameters["const float *in"] = self._address(self._layer.source)
        height, width = self._layer.source_shape[1:]
        outputs, inputs = len(rows) // op.groups, op.weight.shape[1]
        group = "" if op.groups == 1 else f" + o / {outputs} * {inputs * height * width}"
        kernel = self._window("kernel", *op.weight.shape[2:], *op.stride, *op.padding, *op.dilation)
        sides = f"{self._layer.start_shape[1]}, {self._layer.start_shape[2]}"
        self._lines.append(
            f"convolve(&{weight}, {rows.shape[1]}, in{group}, {height}, {width}, {kernel}, {work}, {sides});"
        )

    def _write_channel_ops(self, work: str) -> None:
        """Write the other operations; work: the C expression for where the channel is."""
        for number, step in enumerate(self._layer.channel_ops):
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
                        self._lines.append(f"limit({work}, {size}, {tables.literal(ceiling)});")
                case Add():
                    assert step.other is not None
                    other = f"other{number}"
                    if step.other == self._overwritten:
                        other = "out"
                    else:
                        self._parameters[f"const float *{other}"] = self._address(step.other)
                    self._lines.append(f"add({work}, {size}, {other} + o * {size});")
                case _:
                    self._write_pool(step, work)
                    work = "result"
        if work == "plane":
            self._lines.append(f"copy(result, {math.prod(self._layer.shape[1:])}, plane);")

    def _write_pool(self, step: ChannelOp, work: str) -> None:
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

    def _entry(self, values: FloatArray, label: str) -> str:
        """Return the C expression that reads one value per channel."""
        table = self._table(values.reshape(-1, 1), label)
        return f"entry(&{table})" if table else "0.0f"

    def _table(self, matrix: FloatArray, label: str) -> str:
        """Declare a table and return the name of its reader; "" for a matrix of zeros."""
        table = tables.encode(matrix)
        if not table.count:
            return ""
        name = f"{self._label}_{label}"
        self.tables += tables.declaration(table, name)
        self.table_bytes += table.size
        self._locals.append(f"table {label} = {tables.reader(table, name)};")
        return label

    def _address(self, value: int) -> str:
        return "image" if value == IMAGE else f"arena + {self._offsets[value]}"


def _identifier(layer: FusedLayer) -> str:
    """Return an identifier of C from the first name of a layer, or from its kind."""
    kind = "map" if layer.start is None else type(layer.start).__name__.lower()
    clean = re.sub(r"[^A-Za-z0-9]+", "_", layer.names[0] if layer.names else "").strip("_")[:40]
    return clean if clean and not clean[0].isdigit() else f"{kind}{'_' if clean else ''}{clean}"


def _describe(layer: FusedLayer) -> str:
    ops = ([] if layer.start is None else [layer.start]) + [step.op for step in layer.channel_ops]
    kinds = ", ".join(type(op).__name__ for op in ops) or "copy"
    sides = ["x".join(map(str, shape)) for shape in (layer.source_shape, layer.shape)]
    names = ", ".join(re.sub(r"[^\w.\-]", "_", name, flags=re.ASCII) for name in layer.names)
    return f"{names}{': ' if names else ''}{kinds}; {sides[0]} to {sides[1]}"
