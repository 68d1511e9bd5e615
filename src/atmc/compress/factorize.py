"""Hold conv, linear and attention weights of any model as W = U V + C, by a torch parametrization.

Legend: W a weight seen as a matrix (out, columns), columns = in*kh*kw; U (out, r), V (r, columns), C like W;
r = min(out, columns). Forms (Gui et al. 2019, eq. 3, and the identity-shifted forms of the reference implementation):

    left     W = (U + I) V + C    if out <= columns; starts at V = W, U = C = 0
    right    W = U (V + I) + C    otherwise;         starts at U = W, V = C = 0
    svd      W = U V + C          starts at the singular value decomposition or at sparse terms; C is the rest of W
    rank     W = U V              the same, cut to a rank below r, without C

Grouped and depthwise convolutions have no matrix to factor: their weights stay plain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from atmc.core.errors import unknown
from atmc.core.modules import copy_module

Form = Literal["left", "right", "svd", "rank"]
FORMS: tuple[Form, ...] = ("left", "right", "svd", "rank")
SPARSE_COST = 20  # cost of one product of two nonzeros, which must be looked up, in multiply-adds of dense factors
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class CompressibleWeight:
    """One compressible weight of a model: where it is, and whether it has a matrix to factor."""

    path: str  # "net.conv1.weight"
    module: nn.Module
    parameter: str  # "weight"
    factorable: bool

    @property
    def tensor(self) -> Tensor:
        """The weight as it is now; if it is factorized, built from its factors."""
        tensor: Tensor = getattr(self.module, self.parameter)
        return tensor


def compressible_weights(model: nn.Module, *, exclude: Sequence[str] = ()) -> list[CompressibleWeight]:
    """List the conv, linear and attention weights of the model, except those that match a pattern in exclude.

    Args:
        exclude: shell patterns over paths such as ``net.head.*`` or ``*.weight``.

    Raises:
        ValueError: a pattern matches nothing.
    """
    weights = list(all_compressible_weights(model))
    for pattern in exclude:
        if not any(fnmatch(weight.path, pattern) for weight in weights):
            paths = [weight.path for weight in weights]
            raise ValueError(f"exclude pattern {pattern!r} matches no weight; weights: {paths}")
    return [weight for weight in weights if not any(fnmatch(weight.path, pattern) for pattern in exclude)]


def check_compressible(model: nn.Module, *, exclude: Sequence[str] = ()) -> None:
    """Raise ValueError if a weight cannot be compressed: it is shared, or computed by another parametrization."""
    weights = compressible_weights(model, exclude=exclude)
    for weight in weights:
        if not is_factorized(weight) and not isinstance(weight.tensor, nn.Parameter):
            raise ValueError(
                f"{weight.path} is computed (by weight_norm or another parametrization), not a parameter: "
                "remove that first, or exclude it"
            )
    paths = {weight.path for weight in weights}
    for weight in weights:
        if is_factorized(weight):
            continue
        own = weight.tensor
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter is own and name != weight.path:
                both = " and ".join(path for path in (weight.path, name) if path in paths)
                raise ValueError(
                    f"{weight.path} and {name} share one weight, which cannot be compressed: exclude {both}"
                )


def all_compressible_weights(model: nn.Module) -> Iterator[CompressibleWeight]:
    """Yield every conv, linear and attention weight of the model."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, TRANSPOSED):
            continue  # their weight is laid out (in, out/groups, ...): it stays as it is
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            yield CompressibleWeight(f"{prefix}weight", module, "weight", getattr(module, "groups", 1) == 1)
        elif isinstance(module, nn.MultiheadAttention):
            for parameter in ATTENTION_WEIGHTS:
                if getattr(module, parameter, None) is not None:
                    yield CompressibleWeight(f"{prefix}{parameter}", module, parameter, True)


def is_factorized(weight: CompressibleWeight) -> bool:
    """Return whether a weight is held as factors."""
    if not parametrize.is_parametrized(weight.module, weight.parameter):
        return False
    return isinstance(_parametrization(weight)[0], Factors)


class _Product(torch.autograd.Function):
    """The product ``u @ v`` and its gradients, without the work for columns of u and rows of v that are zero."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        columns, rows = u.any(0), v.any(1)
        ctx.save_for_backward(u, v, columns, rows)
        alive = columns & rows
        return u[:, alive] @ v[alive]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        u, v, columns, rows = ctx.saved_tensors
        grad_u, grad_v = torch.zeros_like(u), torch.zeros_like(v)
        grad_u[:, rows] = grad @ v[rows].T
        grad_v[columns] = u[:, columns].T @ grad
        return grad_u, grad_v


class Factors(nn.Module):
    """The parametrization: (U, V[, C]) -> W in W's own shape."""

    def __init__(self, form: Form, shape: Sequence[int], rank: int) -> None:
        super().__init__()
        self.form: Form = form
        self.shape = tuple(shape)
        self.rank = rank
        self.channels_last = False  # see `use_channels_last`
        self.initial: tuple[Tensor, ...] | None = None  # factors to start from, set only while it is registered
        self.built: Tensor | None = None  # W, set only within `cached_weights`; torch's own cache is one per process

    def forward(self, u: Tensor, v: Tensor, c: Tensor | None = None) -> Tensor:
        """Build W from its factors."""
        if self.built is not None:
            return self.built
        w = cast(Tensor, _Product.apply(u, v))  # type: ignore[no-untyped-call]
        if self.form == "left":
            w = w + v
        elif self.form == "right":
            w = w + u
        w = w.view(self.shape)
        w = w if c is None else w + c
        # Convolutions tell the layout from the strides. With one input channel `contiguous` would not change these,
        # but a clone does.
        return w.clone(memory_format=torch.channels_last) if self.channels_last and w.dim() == 4 else w

    def right_inverse(self, w: Tensor) -> tuple[Tensor, ...]:
        """Return the factors at which this form starts: they give W, or for `rank` its best approximation."""
        if self.initial is not None:
            return self.initial
        matrix = w.detach().reshape(w.shape[0], -1)
        out, columns = matrix.shape
        zero = torch.zeros(w.shape, dtype=w.dtype, device=w.device)
        if self.form == "left":
            return matrix.new_zeros(out, self.rank), matrix.clone(), zero
        if self.form == "right":
            return matrix.clone(), matrix.new_zeros(self.rank, columns), zero
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        root = s[: self.rank].sqrt()
        u, v = (u[:, : self.rank] * root).to(w), (root[:, None] * v[: self.rank]).to(w)
        return (u, v) if self.form == "rank" else (u, v, (w - (u @ v).view_as(w)))


def factorize(
    model: nn.Module, *, start: Literal["identity", "svd"] = "identity", exclude: Sequence[str] = ()
) -> nn.Module:
    """Hold every factorable weight of the model as U, V, C, in place; return the model.

    Args:
        start: "identity" for the forms left and right, "svd" for svd.
        exclude: shell patterns over paths of weights that stay plain.

    >>> model = factorize(nn.Sequential(nn.Linear(3, 2)))
    >>> sorted(factors(model)["0.weight"])
    ['C', 'U', 'V']

    Raises:
        ValueError: a weight cannot be compressed (see `check_compressible`) or is factorized already.
    """
    check_compressible(model, exclude=exclude)
    for weight in compressible_weights(model, exclude=exclude):
        if is_factorized(weight):
            raise ValueError(f"{weight.path} is factorized already")
        if weight.factorable:
            out, columns = weight.tensor.shape[0], weight.tensor[0].numel()
            form: Form = "svd" if start == "svd" else "left" if out <= columns else "right"
            _register_factors(weight, form, min(out, columns))
    return model


def cut_ranks(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Replace each named weight by its best approximation U V of the given rank, in place; return the model."""
    for weight in all_compressible_weights(model):
        if weight.path in ranks:
            _register_factors(weight, "rank", ranks[weight.path])
    return model


def set_initial_factors(weight: CompressibleWeight, u: Tensor, v: Tensor, c: Tensor) -> None:
    """Hold a plain weight as U V + C, in the form svd, with these factors."""
    _register_factors(weight, "svd", u.shape[1], (u, v, c))


def _register_factors(
    weight: CompressibleWeight, form: Form, rank: int, initial: tuple[Tensor, ...] | None = None
) -> None:
    """Hold a plain weight as factors: the initial ones if they are given, else those at which its form starts."""
    factors_module = Factors(form, weight.tensor.shape, rank)
    factors_module.initial = initial
    factors_module.channels_last = _is_channels_last(weight.tensor)
    # unsafe skips torch's check that W stays the same: a cut rank and given factors change it
    unsafe = form == "rank" or initial is not None
    parametrize.register_parametrization(weight.module, weight.parameter, factors_module, unsafe=unsafe)
    factors_module.initial = None


def _is_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.stride(1) == 1 and weight[0, 0].numel() > 1


def factor_structure(model: nn.Module) -> dict[str, tuple[Form, int]]:
    """Return path -> (form, rank) of each factorized weight: with a state dict, enough to rebuild the model."""
    return {
        weight.path: (_parametrization(weight)[0].form, _parametrization(weight)[0].rank)
        for weight in all_compressible_weights(model)
        if is_factorized(weight)
    }


def apply_structure(model: nn.Module, structure: Mapping[str, tuple[str, int]]) -> nn.Module:
    """Factorize a plain model as `factor_structure` described it, in place; return the model.

    The factors have no meaning until a state dict is loaded.

    Raises:
        ValueError: a form is unknown.
    """
    for weight in all_compressible_weights(model):
        if weight.path in structure:
            form, rank = structure[weight.path]
            if form not in FORMS:
                raise unknown("form", form, FORMS)
            _register_factors(weight, form, rank)
    return model


def _parametrization(weight: CompressibleWeight) -> Any:
    """Return torch's list of parametrizations of a weight; its attributes original0, original1, ... are U, V, C."""
    return cast(Any, weight.module.parametrizations)[weight.parameter]


def factors(model: nn.Module, *, exclude: Sequence[str] = ()) -> dict[str, dict[str, nn.Parameter]]:
    """Return path -> parameters of each compressible weight: {"U", "V", "C"}, {"U", "V"} for `rank`, {"W"} if plain."""
    return {weight.path: weight_factors(weight) for weight in compressible_weights(model, exclude=exclude)}


def weight_factors(weight: CompressibleWeight) -> dict[str, nn.Parameter]:
    """Return the parameters of one weight, named as in `factors`."""
    if not is_factorized(weight):
        return {"W": cast(nn.Parameter, weight.tensor)}
    parametrization = _parametrization(weight)
    names = ("U", "V") if parametrization[0].form == "rank" else ("U", "V", "C")
    return {name: getattr(parametrization, f"original{i}") for i, name in enumerate(names)}


def compressible_parameters(model: nn.Module, *, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the parameters of `factors` under one name each: "net.conv1.weight.U", or "net.fc.weight" if plain."""
    return {
        path if name == "W" else f"{path}.{name}": parameter
        for path, parameters in factors(model, exclude=exclude).items()
        for name, parameter in parameters.items()
    }


@torch.no_grad()
def assign_factors(model: nn.Module, values: Mapping[str, np.ndarray]) -> None:
    """Copy values into the factors of a factorized model, named as in `compressible_parameters`; ignore other names."""
    for path, parameters in factors(model).items():
        for name, parameter in parameters.items():
            if name != "W":
                parameter.copy_(torch.from_numpy(values[f"{path}.{name}"]).view_as(parameter))


def use_channels_last(model: nn.Module) -> nn.Module:
    """Lay out 4-dimensional parameters, and every W that is built, in channels_last; in place, return the model."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.clone(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, Factors):
            module.channels_last = True
    return model


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Build every factorized W only once within the context, with its graph; parameters must not change inside."""
    held = []
    with torch.enable_grad():
        for weight in all_compressible_weights(model):
            if is_factorized(weight) and (module := _parametrization(weight)[0]).built is None:
                module.built = weight.tensor
                held.append(module)
    try:
        yield
    finally:
        for module in held:
            module.built = None


def compose(form: Form, u: np.ndarray, v: np.ndarray, c: np.ndarray | None) -> np.ndarray:
    """Compute W (out, columns) float32 from its factors, the same bits on every machine.

    Each entry is summed in float64 in a fixed order (the products U[i, j] V[j, k] of nonzeros by rising j, then the
    identity's term, then C) and rounded once. Beyond float32's range it is infinite.
    """
    total = _product(u, v)
    if form == "left":
        total += v
    elif form == "right":
        total += u
    if c is not None:
        total += c.reshape(total.shape)
    with np.errstate(over="ignore"):
        return total.astype(np.float32)


def product_cost(u: np.ndarray, v: np.ndarray) -> int:
    """Estimate how long `compose` takes for these factors, in multiply-adds of dense factors."""
    return min(u.size * int(v.shape[1]), SPARSE_COST * _count_products(u, v))


def _count_products(u: np.ndarray, v: np.ndarray) -> int:
    """Count the products U[i, j] V[j, k] that are not zero."""
    return int(np.count_nonzero(u, axis=0).astype(np.int64) @ np.count_nonzero(v, axis=1).astype(np.int64))


def _product(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Compute U V in float64, each entry summed by rising j: a few rows at a time, or over few nonzeros only.

    Both ways give the same bits: adding a product that is zero changes no sum that began at 0.
    """
    total = np.zeros((u.shape[0], v.shape[1]))
    if SPARSE_COST * _count_products(u, v) < u.shape[0] * u.shape[1] * v.shape[1]:
        for j in range(u.shape[1]):
            rows, columns = np.flatnonzero(u[:, j]), np.flatnonzero(v[j])
            if len(rows) and len(columns):
                total[np.ix_(rows, columns)] += np.outer(
                    u[rows, j].astype(np.float64), v[j, columns].astype(np.float64)
                )
        return total
    u, v, product = u.astype(np.float64), v.astype(np.float64), np.empty((8, v.shape[1]))
    for start in range(0, len(u), len(product)):
        block = total[start : start + len(product)]
        for j in range(u.shape[1]):
            block += np.multiply(u[start : start + len(product), j, None], v[j], out=product[: len(block)])
    return total


def compose_weight(weight: CompressibleWeight) -> Tensor:
    """Compute a factorized weight's W by `compose`, in its own shape, on the CPU."""
    module = _parametrization(weight)[0]
    u, v, *c = (factor.detach().float().cpu().numpy() for factor in weight_factors(weight).values())
    return torch.from_numpy(compose(module.form, u, v, c[0] if c else None)).view(module.shape)


def fold(model: nn.Module) -> nn.Module:
    """Return a plain copy of the model: every factorized weight becomes an ordinary parameter W (see `compose`).

    >>> model = factorize(nn.Sequential(nn.Linear(3, 2)))
    >>> type(fold(model)[0]) is nn.Linear
    True
    """
    plain = copy_module(model)
    for weight in [weight for weight in all_compressible_weights(plain) if is_factorized(weight)]:
        _replace_factors(weight, compose_weight(weight))
    return plain


@torch.no_grad()
def set_factors(model: nn.Module, path: str, form: str, values: Mapping[str, Tensor]) -> None:
    """Give one factorized weight another form, in place: "plain" with {"W"}, or one of FORMS with its factors."""
    weight = next(weight for weight in all_compressible_weights(model) if weight.path == path)
    if form == "plain":
        _replace_factors(weight, values["W"])
        return
    shape = _parametrization(weight)[0].shape
    device = weight_factors(weight)["U"].device
    _replace_factors(weight, torch.zeros(shape))
    initial = [values[name].to(device).clone() for name in ("U", "V", "C") if name in values]
    initial[2:] = [c.view(shape) for c in initial[2:]]
    _register_factors(weight, cast(Form, form), values["U"].shape[1], tuple(initial))


def _replace_factors(weight: CompressibleWeight, plain: Tensor) -> None:
    """Put a plain parameter in place of a weight's factors.

    Copies of the model, which share its injected classes, stay as they are.
    """
    parametrizations = cast(nn.ModuleDict, weight.module.parametrizations)
    device = next(parametrizations.parameters()).device
    plain_class, injected = parametrize.type_before_parametrizations(weight.module), type(weight.module)
    del parametrizations[weight.parameter]
    if parametrizations:  # other weights of the module stay factors: a class like torch's, without this one's property
        own = {"__dict__", "__weakref__", weight.parameter}
        members = {name: value for name, value in vars(injected).items() if name not in own}
        weight.module.__class__ = type(injected.__name__, injected.__bases__, members)
    else:
        weight.module.__class__ = plain_class
        del weight.module.parametrizations
    weight.module.register_parameter(weight.parameter, nn.Parameter(plain.to(device)))
