"""The C text of one stage: its tables, a function with one loop over channels, the call of that function."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from atmc.deploy.export.c import plan, tables
from atmc.deploy.export.c.plan import Plan, Stage, Step
from atmc.deploy.graph.graph import Add, Affine, AvgPool, Conv, Floats, Linear, MaxPool, Relu


class StageText:
    """tables, function and call are text of C; table_bytes what the tables take."""

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
                if stage.steps and isinstance(stage.steps[0].op, plan.POOLS):
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
                        self._lines.append(f"limit({work}, {size}, {tables.literal(ceiling)});")
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
        table = tables.encode(matrix)
        if not table.count:
            return ""
        name = f"{self._label}_{label}"
        self.tables += tables.declare(table, name)
        self.table_bytes += table.size
        self._locals.append(f"table {label} = {tables.opened(table, name)};")
        return label

    def _address(self, value: int) -> str:
        return "image" if value == plan.IMAGE else f"arena + {self._plan.offsets[value]}"


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
