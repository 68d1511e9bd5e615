"""Evaluate small expressions over JSON values, without running any code.

The language is a part of Python's expressions, read by ``ast.parse`` and evaluated here node by node: names and dotted
paths into JSON objects, numbers, strings, f-strings, arithmetic, comparisons, ``and``, ``or``, ``not``,
``A if CONDITION else B``, comprehensions, and the functions of `FUNCTIONS`. `docs/tables.md` describes it for users.

A missing value is None, and so is whatever is computed from one; None prints as an en dash.
"""

from __future__ import annotations

import ast
import operator
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from atmc.commands.seeds import compare_members, is_difference
from atmc.core.errors import unknown

MISSING = "–"
_HYPHEN = "\ua4f8"  # a letter to Python; it replaces the hyphen of a name such as `pgd-strong` while Python parses
_HYPHEN_IN_NAME = re.compile(r"\b([A-Za-z_]\w*)-(?=[A-Za-z_])")
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass
class Lookups:
    """The paths that the expressions of one table looked up: those that exist, and those that do not.

    Attributes:
        absent: by path, the paths that exist in its place.
    """

    present: set[str] = field(default_factory=set)
    absent: dict[str, list[str]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError if a path was looked up in some rows and exists in none."""
        for path, known in self.absent.items():
            if path not in self.present:
                raise unknown("column", path, known)


@dataclass(frozen=True)
class Scope:
    """The names that an expression may use.

    Attributes:
        mappings: values by name; the first mapping that has a name gives its value.
        definitions: expressions by name, for names that no mapping has.
        lookups: where every lookup is recorded.
    """

    mappings: Sequence[Mapping[str, Any]]
    definitions: Mapping[str, ast.expr] = field(default_factory=dict)
    lookups: Lookups = field(default_factory=Lookups)

    def look_up(self, name: str) -> Any:
        """Return the value of a name; None if there is none."""
        for mapping in self.mappings:
            if name in mapping:
                self.lookups.present.add(name)
                return mapping[name]
        if name in self.definitions:  # which may not use itself
            others = {other: node for other, node in self.definitions.items() if other != name}
            return evaluate(self.definitions[name], Scope(self.mappings, others, self.lookups))
        known = [*dict.fromkeys(key for mapping in self.mappings for key in mapping), *self.definitions]
        self.lookups.absent.setdefault(name, known)
        return None

    def look_inside(self, value: Any, key: Any, path: str) -> Any:
        """Return an entry of a JSON object or list; None if there is none.

        Raises:
            ValueError: the value is neither.
        """
        if value is None:
            return None
        if isinstance(value, Mapping):
            if str(key) in value:
                self.lookups.present.add(path)
                return value[str(key)]
            self.lookups.absent.setdefault(path, [path.removesuffix(str(key)) + name for name in value])
            return None
        if isinstance(value, list) and isinstance(key, int):
            return value[key] if -len(value) <= key < len(value) else None
        raise ValueError(f"there is no {path}: {render(value)!r:.60} has no names below it")


def parse(source: str) -> ast.expr:
    """Parse an expression.

    Raises:
        ValueError: it is not one, with the place of the error.
    """
    try:
        return ast.parse(_HYPHEN_IN_NAME.sub(rf"\1{_HYPHEN}", source.strip()), mode="eval").body
    except (SyntaxError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply"
        raise ValueError(f"cannot read the expression {source.strip()!r}: {reason}") from None


def evaluate(node: ast.expr, scope: Scope) -> Any:
    """Return the value of a parsed expression; None if something that it needs is missing.

    Raises:
        ValueError: it uses something that the language lacks, or the values do not fit the operation.
    """
    match node:
        case ast.Constant(value=str() as text):
            return text.replace(_HYPHEN, "-")
        case ast.Constant(value=bool() | int() | float() | None as value):
            return value
        case ast.Name():
            return scope.look_up(_source(node))
        case ast.Attribute(value=inner, attr=name):
            return scope.look_inside(evaluate(inner, scope), name.replace(_HYPHEN, "-"), _source(node))
        case ast.Subscript(value=inner, slice=index):
            key = evaluate(index, scope)
            return None if key is None else scope.look_inside(evaluate(inner, scope), key, _source(node))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _calculate(_ARITHMETIC[type(op)], [evaluate(left, scope), evaluate(right, scope)], node)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _calculate(operator.neg, [evaluate(operand, scope)], node)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not evaluate(operand, scope)
        case ast.BoolOp(op=op, values=values):
            return _first_decisive(op, values, scope)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            operands = [evaluate(operand, scope) for operand in (left, *comparators)]
            return all(_compare(op, *pair, node) for op, pair in zip(ops, pairwise(operands), strict=True))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return evaluate(body if evaluate(test, scope) else orelse, scope)
        case ast.List(elts=elements):
            return [evaluate(element, scope) for element in elements]
        case ast.ListComp() | ast.GeneratorExp():
            return [evaluate(node.elt, inner) for inner in _iterate(node.generators, scope)]
        case ast.JoinedStr(values=parts):
            return "".join(str(evaluate(part, scope)) for part in parts)
        case ast.FormattedValue(value=inner, conversion=-1, format_spec=spec):
            return render(evaluate(inner, scope), "" if spec is None else evaluate(spec, scope))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            if name not in FUNCTIONS:
                raise unknown("function", name, FUNCTIONS)
            return _call(FUNCTIONS[name], [evaluate(argument, scope) for argument in arguments], node)
    raise ValueError(f"an expression of a table cannot contain {_source(node)!r}, see docs/tables.md")


def _source(node: ast.expr) -> str:
    """Return an expression as text."""
    return ast.unparse(node).replace(_HYPHEN, "-")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _calculate(function: Callable[..., Any], operands: list[Any], node: ast.expr) -> Any:
    """Return an operation's result; None if an operand is missing or a divisor is 0."""
    if any(operand is None for operand in operands):
        return None
    if not all(_is_number(operand) for operand in operands):
        raise ValueError(f"{_source(node)!r} calculates with something that is not a number")
    try:
        return function(*operands)
    except ZeroDivisionError:
        return None


def _compare(op: ast.cmpop, left: Any, right: Any, node: ast.expr) -> bool:
    """Return whether a comparison holds. A missing value equals only None and is neither less nor greater."""
    if type(op) not in _COMPARISONS:
        raise ValueError(f"an expression of a table cannot contain {_source(node)!r}, see docs/tables.md")
    if not isinstance(op, ast.Eq | ast.NotEq) and (left is None or right is None):
        return False
    try:
        return _COMPARISONS[type(op)](left, right)
    except TypeError:
        raise ValueError(f"{_source(node)!r} compares values of different kinds") from None


def _first_decisive(op: ast.boolop, values: Sequence[ast.expr], scope: Scope) -> Any:
    """Return the value that decides `and` or `or`, as in Python."""
    value = None
    for operand in values:
        value = evaluate(operand, scope)
        if bool(value) == isinstance(op, ast.Or):
            break
    return value


def _iterate(generators: Sequence[ast.comprehension], scope: Scope) -> Iterator[Scope]:
    """Yield a scope per element of a comprehension."""
    if not generators:
        yield scope
        return
    target, elements = generators[0].target, evaluate(generators[0].iter, scope)
    if not isinstance(target, ast.Name):
        raise ValueError(f"expected a single name after 'for', got {_source(target)!r}")
    for element in elements or []:
        inner = replace(scope, mappings=[{_source(target): element}, *scope.mappings])
        if all(evaluate(condition, inner) for condition in generators[0].ifs):
            yield from _iterate(generators[1:], inner)


def _call(function: Callable[..., Any], arguments: list[Any], node: ast.expr) -> Any:
    """Return a function's result; None if its first argument is missing or an empty list has no such value."""
    if arguments and arguments[0] is None:
        return None
    try:
        return function(*arguments)
    except (TypeError, AttributeError):
        raise ValueError(f"the arguments of {_source(node)!r} do not fit, see docs/tables.md") from None
    except statistics.StatisticsError:
        return None


def list_failed_checks(checks: Sequence[Mapping[str, Any]]) -> str:
    """Return the names of the checks that failed, as text: 'none' if none did, 'not run' if there are no checks."""
    names = [f"`{check['name']}`" for check in checks if check["ok"] is False]
    return ", ".join(names) or ("none" if checks else "not run")


def interpolate(points: Sequence[Sequence[float]], x: float) -> float | None:
    """Return y at x on the line through points (x, y), sorted by x; None if x is over 2 % outside of their range."""
    for (left, low), (right, high) in pairwise(points):
        if left * 0.98 <= x <= right * 1.02:
            return low + min(1.0, max(0.0, (x - left) / (right - left))) * (high - low)
    return None


def _smallest(values: Sequence[Any]) -> Any:
    return min((value for value in values if value is not None), default=None)


def _largest(values: Sequence[Any]) -> Any:
    return max((value for value in values if value is not None), default=None)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "round": round,
    "len": len,
    "min": _smallest,
    "max": _largest,
    "mean": statistics.mean,
    "median": statistics.median_high,
    "join": lambda separator, values: separator.join(map(render, values)),
    "split": lambda text, separator: text.split(separator),
    "replace": lambda text, old, new: text.replace(old, new),
    "failed": list_failed_checks,
    "interpolate": interpolate,
    "deviation": statistics.stdev,
    "difference": compare_members,
    "bold": lambda text, condition: f"**{text}**" if condition else text,
}


def is_accuracy(value: Any) -> bool:
    """Return whether a value is an accuracy as metrics.json has it, with its interval and number of images."""
    return isinstance(value, Mapping) and {"accuracy", "n", "ci95"} <= value.keys()


def render(value: Any, spec: str = "") -> str:
    """Return a value as text.

    Args:
        value: a JSON value; an accuracy is written "97.50 [95.33, 98.67] of 360", a difference "+0.42 [-0.10, +0.95]".
        spec: a format of Python (".4f", ",", ".1%"), which takes the accuracy of an accuracy; or "interval", an
            accuracy without the number of images; or "code", text in a fixed-width font.

    Raises:
        ValueError: the format does not fit the value.
    """
    if value is None:
        return MISSING
    if spec == "code":
        return f"`{render(value)}`"
    if is_accuracy(value):
        if spec in ("", "interval"):
            low, high = value["ci95"]
            text = f"{100 * value['accuracy']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
            return text if spec else f"{text} of {value['n']:,}"
        value = value["accuracy"]
    if is_difference(value):
        low, high = value["ci95"]
        return f"{100 * value['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(render(item, spec) for item in value)
    if isinstance(value, Mapping):
        raise ValueError(f"an object with {', '.join(value)} is no single value: name one of these, as in a.b")
    try:
        return format(value, spec)
    except ValueError:
        raise ValueError(f"the format {spec!r} does not fit {value!r:.60}") from None
