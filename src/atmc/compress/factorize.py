"""W = U V + C for the weights of any model, as a torch parametrization.

Legend: W a conv or linear weight seen as a matrix (out, in*kh*kw); U (out, r), V (r, in*kh*kw), C like W;
r = min(out, in*kh*kw). Forms (Gui et al. 2019, eq. 3, and the identity-shifted forms of the authors' program):

    left     W = (U + I) V + C    where out <= in*kh*kw; starts at V = W, U = C = 0
    right    W = U (V + I) + C    otherwise;             starts at U = W, V = C = 0
    svd      W = U V + C          starts at the singular value decomposition, C = 0
    rank     W = U V              the same, cut to a rank below r, no C

Grouped and depthwise convolutions have no matrix to factor: they keep C alone, which is their plain weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Form = Literal["left", "right", "svd", "rank"]
FORMS: tuple[Form, ...] = ("left", "right", "svd", "rank")
SPARSE_COST = 20  # of a product of two nonzeros that were looked up, in products of dense factors
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Site:
    """One compressible weight of a model: where it is and whether it can be factored."""

    path: str  # "net.conv1.weight"
    module: nn.Module
    parameter: str  # "weight"
    factorable: bool


def sites(model: nn.Module, *, exclude: Sequence[str] = ()) -> list[Site]:
    """Every conv, linear and attention weight of the model, less those that match a pattern in exclude.

    Args:
        exclude: shell patterns over paths such as ``net.head.*`` or ``*.weight``.

    Raises:
        ValueError: a pattern matches nothing.
    """
    found = list(all_sites(model))
    for pattern in exclude:
        if not any(fnmatch(site.path, pattern) for site in found):
            raise ValueError(f"exclude pattern {pattern!r} matches no weight; weights: {[s.path for s in found]}")
    return [site for site in found if not any(fnmatch(site.path, pattern) for pattern in exclude)]


def refuse_unfit(model: nn.Module, *, exclude: Sequence[str] = ()) -> None:
    """ValueError for a weight that cannot be compressed: shared, or computed by somebody else's parametrization."""
    kept = sites(model, exclude=exclude)
    for site in kept:
        if not factored(site) and not isinstance(getattr(site.module, site.parameter), nn.Parameter):
            raise ValueError(
                f"{site.path} is computed (by weight_norm or another parametrization), not a parameter: "
                "remove that first, or exclude it"
            )
    paths = {site.path for site in kept}
    for site in kept:
        if factored(site):
            continue
        weight = getattr(site.module, site.parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter is weight and name != site.path:
                both = " and ".join(path for path in (site.path, name) if path in paths)
                raise ValueError(f"{site.path} and {name} share one weight, which cannot be compressed: exclude {both}")


def all_sites(model: nn.Module) -> Iterator[Site]:
    """Every conv, linear and attention weight."""
    for prefix, module in model.named_modules():
        lead = f"{prefix}." if prefix else ""
        if isinstance(module, TRANSPOSED):
            continue  # their weight is laid out (in, out/groups, ...): left as it is
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            yield Site(f"{lead}weight", module, "weight", getattr(module, "groups", 1) == 1)
        elif isinstance(module, nn.MultiheadAttention):
            for parameter in ATTENTION_WEIGHTS:
                if getattr(module, parameter, None) is not None:
                    yield Site(f"{lead}{parameter}", module, parameter, True)


def factored(site: Site) -> bool:
    """Whether this weight is held as our factors."""
    if not parametrize.is_parametrized(site.module, site.parameter):
        return False
    return isinstance(cast(Any, site.module.parametrizations)[site.parameter][0], Factors)


class _Product(torch.autograd.Function):
    """U V for factors with dead columns and rows, which cost nothing: the values and gradients of ``u @ v``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        columns, rows = u.any(0), v.any(1)
        ctx.save_for_backward(u, v, columns, rows)
        both = columns & rows
        return u[:, both] @ v[both]

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
        self.given: tuple[Tensor, ...] | None = None  # while it is registered: the factors, where they are known

    def forward(self, u: Tensor, v: Tensor, c: Tensor | None = None) -> Tensor:
        """W from its factors."""
        w = cast(Tensor, _Product.apply(u, v))  # type: ignore[no-untyped-call]
        if self.form == "left":
            w = w + v
        elif self.form == "right":
            w = w + u
        w = w.view(self.shape)
        w = w if c is None else w + c
        # Convolutions judge the layout by the strides, which `contiguous` leaves as they are where there is one input
        # channel: hence a clone.
        return w.clone(memory_format=torch.channels_last) if self.channels_last and w.dim() == 4 else w

    def right_inverse(self, w: Tensor) -> tuple[Tensor, ...]:
        """The factors at which this form starts from W: exact but for `rank`, which is W's best approximation."""
        if self.given is not None:
            return self.given
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
    """Hold every factorable weight of the model as U, V, C; in place, and returned.

    >>> model = factorize(nn.Sequential(nn.Linear(3, 2)))
    >>> sorted(factors(model)["0.weight"])
    ['C', 'U', 'V']

    Raises:
        ValueError: weights that cannot be (see `refuse_unfit`), or the model is factorized already.
    """
    refuse_unfit(model, exclude=exclude)
    for site in sites(model, exclude=exclude):
        if factored(site):
            raise ValueError(f"{site.path} is factorized already")
        if site.factorable:
            out, columns = _matrix_shape(site)
            form: Form = "svd" if start == "svd" else "left" if out <= columns else "right"
            _register(site, form, min(out, columns))
    return model


def cut_ranks(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Replace each named weight by its best approximation U V of the given rank; in place, and returned."""
    for site in all_sites(model):
        if site.path in ranks:
            _register(site, "rank", ranks[site.path])
    return model


def _matrix_shape(site: Site) -> tuple[int, int]:
    weight = getattr(site.module, site.parameter)
    return weight.shape[0], weight[0].numel()


def _register(site: Site, form: Form, rank: int, given: tuple[Tensor, ...] | None = None) -> None:
    """Hold a plain weight as factors: those given, or those at which the form starts from it."""
    shape = getattr(site.module, site.parameter).shape
    holder = Factors(form, shape, rank)
    holder.given = given
    holder.channels_last = _is_channels_last(getattr(site.module, site.parameter))
    # unsafe: torch's own check would compare W before and after, which a cut rank changes
    unsafe = form == "rank" or given is not None
    parametrize.register_parametrization(site.module, site.parameter, holder, unsafe=unsafe)
    holder.given = None


def _is_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.stride(1) == 1 and weight[0, 0].numel() > 1


def structure(model: nn.Module) -> dict[str, tuple[Form, int]]:
    """Path of each factorized weight -> (form, rank): with a state dict, all that is needed to rebuild the model."""
    return {
        site.path: (_factors_module(site).form, _factors_module(site).rank)
        for site in all_sites(model)
        if factored(site)
    }


def restructure(model: nn.Module, shape: Mapping[str, tuple[str, int]]) -> nn.Module:
    """Give a plain model the structure of `structure`, in place; its values mean nothing until a state is loaded."""
    for site in all_sites(model):
        if site.path in shape:
            form, rank = shape[site.path]
            if form not in FORMS:
                raise ValueError(f"unknown form {form!r} of {site.path}: expected one of {', '.join(FORMS)}")
            _register(site, form, rank)
    return model


def _factors_module(site: Site) -> Factors:
    parametrizations = cast(nn.ModuleDict, site.module.parametrizations)
    return cast(Factors, cast(Any, parametrizations[site.parameter])[0])


def factors(model: nn.Module, *, exclude: Sequence[str] = ()) -> dict[str, dict[str, nn.Parameter]]:
    """Path of each compressible weight -> its parameters: {"U", "V", "C"}, {"U", "V"} for `rank`, {"W"} if plain."""
    return {site.path: factors_of(site) for site in sites(model, exclude=exclude)}


def factors_of(site: Site) -> dict[str, nn.Parameter]:
    """One weight's parameters, as in `factors`."""
    if not factored(site):
        return {"W": getattr(site.module, site.parameter)}
    holder = cast(Any, site.module.parametrizations)[site.parameter]
    names = ("U", "V") if _factors_module(site).form == "rank" else ("U", "V", "C")
    return {name: getattr(holder, f"original{i}") for i, name in enumerate(names)}


def compressible(model: nn.Module, *, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The flat view of `factors`: "net.conv1.weight.U" -> U, "net.fc.weight" -> a plain weight."""
    return {
        path if name == "W" else f"{path}.{name}": parameter
        for path, parts in factors(model, exclude=exclude).items()
        for name, parameter in parts.items()
    }


@torch.no_grad()
def assign_factors(model: nn.Module, values: Mapping[str, np.ndarray]) -> None:
    """Copy values into the factors of a factorized model; keys as in `compressible`, others are passed over."""
    for path, parts in factors(model).items():
        for name, parameter in parts.items():
            if name != "W":
                parameter.copy_(torch.from_numpy(values[f"{path}.{name}"]).view_as(parameter))


def use_channels_last(model: nn.Module) -> nn.Module:
    """Lay every 4-dimensional parameter, and every W that is built, out in channels_last; in place, and returned."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.clone(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, Factors):
            module.channels_last = True
    return model


@contextmanager
def built_once(model: nn.Module) -> Iterator[None]:
    """Within, every W is built once, with its graph; parameters must not change inside."""
    with parametrize.cached():
        with torch.enable_grad():
            for site in all_sites(model):
                if factored(site):
                    getattr(site.module, site.parameter)
        yield


def compose(form: Form, u: np.ndarray, v: np.ndarray, c: np.ndarray | None) -> np.ndarray:
    """W (out, columns) float32 from its factors, the same on every machine.

    Each entry is summed in float64 in a fixed order - the products U[i, j] V[j, :] by rising j where both are nonzero,
    then the identity's term, then C - and rounded once. Beyond float32's range it is infinite.
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
    """About how long `compose` takes for these factors, in multiply-adds of dense ones."""
    return min(u.size * int(v.shape[1]), SPARSE_COST * _products(u, v))


def _products(u: np.ndarray, v: np.ndarray) -> int:
    """How many products U[i, j] V[j, k] are not zero."""
    return int(np.count_nonzero(u, axis=0).astype(np.int64) @ np.count_nonzero(v, axis=1).astype(np.int64))


def _product(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """U V in float64, each entry summed by rising j: a few rows at a time, or the nonzeros alone where they are few.

    Both give the same bits: what a product of zero adds changes no sum that began at 0.
    """
    total = np.zeros((u.shape[0], v.shape[1]))
    if SPARSE_COST * _products(u, v) < u.shape[0] * u.shape[1] * v.shape[1]:
        for j in range(u.shape[1]):
            rows, columns = np.flatnonzero(u[:, j]), np.flatnonzero(v[j])
            if len(rows) and len(columns):
                total[np.ix_(rows, columns)] += np.outer(
                    u[rows, j].astype(np.float64), v[j, columns].astype(np.float64)
                )
        return total
    u, v, product = u.astype(np.float64), v.astype(np.float64), np.empty((8, v.shape[1]))
    for at in range(0, len(u), len(product)):
        part = total[at : at + len(product)]
        for j in range(u.shape[1]):
            part += np.multiply(u[at : at + len(product), j, None], v[j], out=product[: len(part)])
    return total


def composed(site: Site) -> Tensor:
    """A factorized weight's W by `compose`, in its own shape, on the CPU."""
    module = _factors_module(site)
    holder = cast(Any, site.module.parametrizations)[site.parameter]
    names = ["original0", "original1"] + ([] if module.form == "rank" else ["original2"])
    u, v, *c = (getattr(holder, name).detach().float().cpu().numpy() for name in names)
    return torch.from_numpy(compose(module.form, u, v, c[0] if c else None)).view(module.shape)


def fold(model: nn.Module) -> nn.Module:
    """A plain copy of the model: every factorized weight becomes an ordinary parameter holding W (see `compose`).

    >>> model = factorize(nn.Sequential(nn.Linear(3, 2)))
    >>> type(fold(model)[0]) is nn.Linear
    True
    """
    plain = copy.deepcopy(model)
    for site in [site for site in all_sites(plain) if factored(site)]:
        _unregister(site, composed(site))
    return plain


@torch.no_grad()
def put_factors(model: nn.Module, path: str, form: str, parts: Mapping[str, Tensor]) -> None:
    """Give one factorized weight another form: "plain" with {"W"}, or one of FORMS with its factors; in place."""
    site = next(site for site in all_sites(model) if site.path == path)
    if form == "plain":
        _unregister(site, parts["W"])
        return
    shape = _factors_module(site).shape
    device = factors_of(site)["U"].device
    _unregister(site, torch.zeros(shape))
    given = [parts[name].to(device).clone() for name in ("U", "V", "C") if name in parts]
    given[2:] = [c.view(shape) for c in given[2:]]
    _register(site, cast(Form, form), parts["U"].shape[1], tuple(given))


def _unregister(site: Site, weight: Tensor) -> None:
    """A plain parameter in place of a weight's factors. Copies of the model, which share its classes, are unharmed."""
    holders = cast(nn.ModuleDict, site.module.parametrizations)
    device = next(holders.parameters()).device
    plain_class, injected = parametrize.type_before_parametrizations(site.module), type(site.module)
    del holders[site.parameter]
    if holders:  # other weights of the module stay factors: a class like torch's, without this one's property
        own = {"__dict__", "__weakref__", site.parameter}
        members = {name: value for name, value in vars(injected).items() if name not in own}
        site.module.__class__ = type(injected.__name__, injected.__bases__, members)
    else:
        site.module.__class__ = plain_class
        del site.module.parametrizations
    site.module.register_parameter(site.parameter, nn.Parameter(weight.to(device)))
