"""Interval bounds of a network's outputs over all images of a threat, differentiable in the weights (IBP).

An `Interval` takes the place of the images: the module's own code runs on it, and every torch function that it meets
has a rule in `RULES` that returns bounds of the function's outputs. The clean images pass through beside the bounds, so
that batch norm in training mode uses the statistics of the clean pass, and one pass gives clean logits as well.

These bounds are for training and validation: they are calculated in floating point, without a margin for rounding.

`initialize_weights`, `looseness` and `imbalance` serve the start of a training, while the ball grows (Shi et al. 2021).

Legend: n images; d values of an image; lower <= z <= upper elementwise for the values z of every allowed image.
Sources: Gowal et al. 2018 (interval propagation, margins through the last layer); the bounds of an l2 or l1 ball behind
the first affine layer by the dual norm, as in Wong and Kolter 2018, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atmc.core.errors import unknown
from atmc.core.rng import Noise
from atmc.robust.threats import Threat

Rule = Callable[..., Any]


@dataclass(frozen=True)
class Ball:
    """An l2 or l1 ball before the first affine layer: |change / scale|_p <= eps, scale broadcast like the values."""

    norm: str
    eps: float
    scale: Tensor


@dataclass(frozen=True)
class Linear:
    """The linear layer that made an interval: `margins` goes through it once more, for differences of its outputs."""

    inputs: Interval
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Interval:
    """Values of a network for all images of a threat: clean ones, and bounds of the others.

    Args:
        clean, lower, upper: tensors of one shape, images first.
        ball: a tighter description of the values, as long as only images, not features, have been computed.
        linear: the linear layer whose outputs these are, if they are a linear layer's.
    """

    clean: Tensor
    lower: Tensor
    upper: Tensor
    ball: Ball | None = None
    linear: Linear | None = None

    @classmethod
    def of(cls, x: Tensor, threat: Threat) -> Interval:
        """Return the images x (n, c, h, w) in [0, 1], and bounds of what the threat allows in their place.

        >>> from atmc.robust.threats import Linf
        >>> box = Interval.of(torch.tensor([[0.25, 1.0]]), Linf(0.5))
        >>> box.lower.tolist(), box.upper.tolist()
        ([[0.0, 0.5]], [[0.75, 1.0]])
        """
        lower, upper = (x - threat.eps).clamp(0, 1), (x + threat.eps).clamp(0, 1)
        ball = None if threat.name == "linf" else Ball(threat.name, threat.eps, torch.ones((), device=x.device))
        return cls(x, lower, upper, ball)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Apply the rule of a torch function that was called with intervals."""
        return apply_rule(function.__name__, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        """Return what a tensor of this shape has, or a method with a rule."""
        if name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad"):
            return getattr(self.clean, name)
        if name in RULES:
            return lambda *args, **kwargs: apply_rule(name, self, *args, **kwargs)
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        raise UnsupportedOperation(name)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.clean.dim()

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one side of it."""
        return self.clean.size() if dim is None else self.clean.size(dim)

    def __len__(self) -> int:
        return len(self.clean)

    def __add__(self, other: Any) -> Interval:
        return cast(Interval, apply_rule("add", self, other))

    def __sub__(self, other: Any) -> Interval:
        return cast(Interval, apply_rule("sub", self, other))

    def __rsub__(self, other: Any) -> Interval:
        return cast(Interval, apply_rule("sub", other, self))

    def __mul__(self, other: Any) -> Interval:
        return cast(Interval, apply_rule("mul", self, other))

    def __truediv__(self, other: Any) -> Interval:
        return cast(Interval, apply_rule("div", self, other))

    def __rtruediv__(self, other: Any) -> Interval:
        return cast(Interval, apply_rule("div", other, self))

    def __neg__(self) -> Interval:
        return cast(Interval, apply_rule("neg", self))

    def __getitem__(self, index: Any) -> Interval:
        return self.map(lambda values: values[index])

    __radd__ = __add__
    __iadd__ = __add__
    __rmul__ = __mul__

    def map(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """Return the interval through a nondecreasing elementwise function, or one that rearranges values."""
        return Interval(function(self.clean), function(self.lower), function(self.upper))


class UnsupportedOperation(ValueError):
    """The network calls a torch function that has no rule; the message names it."""

    def __init__(self, name: str) -> None:
        close = unknown("operation", name, RULES, expected="one with a rule for intervals")
        super().__init__(f"the network cannot be bounded by intervals: {close}")


def apply_rule(name: str, *args: Any, **kwargs: Any) -> Any:
    """Return what the rule of a torch function gives. Raises UnsupportedOperation if there is none."""
    if name not in RULES:
        raise UnsupportedOperation(name)
    return RULES[name](*args, **kwargs)


def bound_logits(model: nn.Module, x: Tensor, threat: Threat) -> Interval:
    """Return the logits of the images x (n, c, h, w), and bounds of them for all images that the threat allows.

    The model runs in the mode that it is in: in training mode batch norm normalizes by, and counts, the clean images.

    Raises:
        UnsupportedOperation: the model calls a torch function without a rule.
        ValueError: the model does not return logits (n, classes).

    >>> from atmc.robust.threats import Linf
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> logits = bound_logits(model, torch.rand(2, 1, 2, 2), Linf(0.1))
    >>> bool((logits.lower <= logits.clean).all()), logits.upper.shape
    (True, torch.Size([2, 3]))
    """
    logits = model(Interval.of(x, threat))
    if not isinstance(logits, Interval) or logits.dim() != 2 or len(logits) != len(x):
        shape = tuple(logits.shape) if isinstance(logits, Interval) else type(logits).__name__
        raise ValueError(f"expected logits of shape ({len(x)}, classes) from the model, got {shape}")
    return logits


def margins(logits: Interval, y: Tensor) -> Tensor:
    """Return upper bounds (n, classes) of z_j - z_y, the logit of each class less that of the label y (n,).

    If a linear layer made the logits, the differences of its rows are bounded rather than those of its outputs, which
    is tighter (Gowal et al. 2018, section 3). The entry of the label is 0.
    """
    if logits.linear is None:
        bounds = logits.upper - logits.lower.gather(1, y[:, None])
        return bounds.scatter(1, y[:, None], 0.0)
    inputs, weight, bias = logits.linear.inputs, logits.linear.weight, logits.linear.bias
    middle, radius = (inputs.upper + inputs.lower) / 2, (inputs.upper - inputs.lower) / 2
    rows = weight[None] - weight[y][:, None]  # (n, classes, features)
    bounds = torch.einsum("nkd,nd->nk", rows, middle) + torch.einsum("nkd,nd->nk", rows.abs(), radius)
    return bounds if bias is None else bounds + bias[None] - bias[y][:, None]


def certified(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Return (n,) bool: whether the bounds leave the label y (n,) the largest logit for every image that is allowed."""
    bounds = margins(bound_logits(model, x, threat), y)
    return (bounds.scatter(1, y[:, None], -torch.inf) < 0).all(1) & bounds.isfinite().all(1)


_ACTIVATED: ContextVar[list[Interval] | None] = ContextVar("_ACTIVATED", default=None)


@contextmanager
def collect_preactivations() -> Iterator[list[Interval]]:
    """Collect the inputs of every ReLU that intervals go through within the context, in order."""
    collected: list[Interval] = []
    token = _ACTIVATED.set(collected)
    try:
        yield collected
    finally:
        _ACTIVATED.reset(token)


def looseness(x: Interval, preactivations: Sequence[Interval], *, tolerance: float = 0.5) -> Tensor:
    """Return how far the bounds widen from the images to the inputs of the ReLUs, a scalar, 0 if they do not.

    It is the mean over the ReLUs of max(0, tolerance - w_0 / w_i), for the mean width w_0 of the images' bounds and w_i
    of the bounds of the i-th ReLU's inputs (Shi et al. 2021, section 4.2, "bound tightness").
    """
    width = (x.upper - x.lower).mean()
    ratios = [width / (z.upper - z.lower).mean().clamp_min(1e-12) for z in preactivations]
    return _shortfall(ratios, tolerance, like=width)


def imbalance(preactivations: Sequence[Interval], *, tolerance: float = 0.5) -> Tensor:
    """Return how unevenly the inputs of ReLUs lie around 0, a scalar, 0 if neither side outweighs the other by far.

    For the centers c of the bounds of one ReLU, those of entries that are surely active (lower >= 0) and surely
    inactive (upper <= 0) are compared: the sums of |c|, and the sums of squared distances to the mean of all centers.
    Each pair of sums has a ratio r <= 1 of the smaller to the larger one; the result is the mean over the ReLUs of
    max(0, tolerance - r), added up over both pairs (Shi et al. 2021, section 4.2, "ReLU balance"). A ReLU that has no
    entry on a side counts as r = 0, without a gradient.
    """
    ratios = []
    for z in preactivations:
        center = (z.upper + z.lower) / 2
        active, inactive = (z.lower >= 0).to(center.dtype), (z.upper <= 0).to(center.dtype)
        spread = (center - center.mean()).square()
        for weight in (center.abs(), spread):
            sums = (weight * active).sum(), (weight * inactive).sum()
            ratios.append(torch.minimum(*sums) / torch.maximum(*sums).clamp_min(1e-12))
    return 2 * _shortfall(ratios, tolerance, like=torch.zeros(()))


def _shortfall(ratios: Sequence[Tensor], tolerance: float, *, like: Tensor) -> Tensor:
    """Return the mean of max(0, tolerance - ratio); 0 without ratios."""
    return F.relu(tolerance - torch.stack(list(ratios))).mean() if ratios else torch.zeros_like(like)


@torch.no_grad()
def initialize_weights(model: nn.Module, seed: int) -> None:
    """Draw the weights of all convolutions and linear layers so that bounds keep their width from layer to layer.

    An entry is normal with standard deviation sqrt(2 pi) / m for m inputs per output, so that m E|w| / 2 is 1: a layer
    widens bounds by m E|w|, and a ReLU halves them (Shi et al. 2021, section 4.1). Biases become 0, and everything else
    stays as it is.

    Args:
        model: changed in place.
        seed: keys the random numbers.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    for index, layer in enumerate(layers):
        noise = Noise(torch.tensor([index]), seed=seed, purpose="initialization")
        deviation = math.sqrt(2 * math.pi) / layer.weight[0].numel()
        layer.weight.copy_(deviation * noise.normal(layer.weight.shape)[0])
        if layer.bias is not None:
            layer.bias.zero_()


# Rules. Each takes what the torch function takes, with intervals in place of tensors.


def _affine(function: Callable[..., Tensor]) -> Rule:
    """Return the rule of a function (inputs, weight, bias, ...) that is affine in its inputs."""

    def rule(inputs: Interval, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Interval:
        middle, radius = (inputs.upper + inputs.lower) / 2, (inputs.upper - inputs.lower) / 2
        both = function(torch.cat((inputs.clean, middle)), weight, bias, *args, **kwargs)
        clean, middle = both.chunk(2)
        radius = function(radius, weight.abs(), None, *args, **kwargs)
        lower, upper = middle - radius, middle + radius
        if inputs.ball is not None:
            reach = _reach(inputs.ball, inputs.clean, weight, lambda x, w: function(x, w, None, *args, **kwargs))
            lower, upper = torch.maximum(lower, clean - reach), torch.minimum(upper, clean + reach)
        linear = Linear(inputs, weight, bias) if function is F.linear and inputs.dim() == 2 else None
        return Interval(clean, lower, upper, linear=linear)

    return rule


def _reach(ball: Ball, like: Tensor, weight: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return how far a change in the ball moves each output of an affine layer: eps times the dual norm of its row."""
    scale = ball.scale.expand(like.shape[1:])[None]
    if ball.norm == "l2":
        return ball.eps * apply(scale.square(), weight.square()).clamp_min(0).sqrt()
    # l1: the largest |weight| times the largest scale bounds the largest product
    largest = weight.abs().flatten(1).amax(1) * scale.amax()
    return ball.eps * largest.view(-1, *[1] * (like.dim() - 2))


def _unary(function: Callable[..., Tensor]) -> Rule:
    """Return the rule of a function of one tensor that never decreases, or that rearranges values per image."""

    def rule(inputs: Interval, *args: Any, **kwargs: Any) -> Interval:
        kwargs.pop("inplace", None)
        return inputs.map(lambda values: function(values, *args, **kwargs))

    return rule


def _relu(function: Callable[..., Tensor]) -> Rule:
    """Return the rule of a ReLU, which is collected where `collect_preactivations` asks for it."""
    apply = _unary(function)

    def rule(inputs: Interval, *args: Any, **kwargs: Any) -> Interval:
        collected = _ACTIVATED.get()
        if collected is not None:
            collected.append(inputs)
        return cast(Interval, apply(inputs, *args, **kwargs))

    return rule


def _reshape(function: Callable[..., Tensor]) -> Rule:
    """Return the rule of a function that only gives the values of an image another shape; a ball stays one."""

    def rule(inputs: Interval, *args: Any, **kwargs: Any) -> Interval:
        shaped = inputs.map(lambda values: function(values, *args, **kwargs))
        if inputs.ball is None:
            return shaped
        scale = function(inputs.ball.scale.expand_as(inputs.clean), *args, **kwargs)[0]
        return replace(shaped, ball=replace(inputs.ball, scale=scale))

    return rule


def _leaky_relu(inputs: Interval, negative_slope: float = 0.01, inplace: bool = False) -> Interval:
    if negative_slope < 0:
        raise UnsupportedOperation("leaky_relu with a negative slope below 0")
    return inputs.map(lambda values: F.leaky_relu(values, negative_slope))


def _dropout(inputs: Interval, p: float = 0.5, training: bool = True, inplace: bool = False) -> Interval:
    """One mask for the clean values and both bounds."""
    if not training or p == 0:
        return inputs
    mask = F.dropout(torch.ones_like(inputs.clean), p, training)
    return inputs.map(lambda values: values * mask)


def _pool(function: Callable[..., Tensor]) -> Rule:
    """Return the rule of a pooling without indices: one call for the clean values and both bounds."""

    def rule(inputs: Interval, *args: Any, **kwargs: Any) -> Interval:
        if kwargs.pop("return_indices", False):
            raise UnsupportedOperation(f"{function.__name__} with indices")
        pooled = function(torch.cat((inputs.clean, inputs.lower, inputs.upper)), *args, **kwargs)
        clean, lower, upper = pooled.chunk(3)
        return Interval(clean, lower, upper)

    return rule


def _add(one: Any, other: Any, *, alpha: float = 1) -> Interval:
    if alpha != 1:
        raise UnsupportedOperation("add with alpha")
    if isinstance(one, Interval) and isinstance(other, Interval):
        return Interval(one.clean + other.clean, one.lower + other.lower, one.upper + other.upper)
    interval, constant = (one, other) if isinstance(one, Interval) else (other, one)
    moved = interval.map(lambda values: values + constant)
    return replace(moved, ball=interval.ball) if moved.shape == interval.shape else moved


def _neg(inputs: Interval) -> Interval:
    return Interval(-inputs.clean, -inputs.upper, -inputs.lower, inputs.ball)


def _sub(one: Any, other: Any, *, alpha: float = 1) -> Interval:
    return _add(one, _neg(other) if isinstance(other, Interval) else -other, alpha=alpha)


def _mul(one: Any, other: Any) -> Interval:
    if isinstance(one, Interval) and isinstance(other, Interval):
        raise UnsupportedOperation("mul of two values that depend on the image")
    interval, factor = (one, other) if isinstance(one, Interval) else (other, one)
    factor = torch.as_tensor(factor, dtype=interval.dtype, device=interval.device)
    ends = interval.lower * factor, interval.upper * factor
    ball = interval.ball and replace(interval.ball, scale=interval.ball.scale * factor.abs())
    return Interval(interval.clean * factor, torch.minimum(*ends), torch.maximum(*ends), ball)


def _div(one: Any, other: Any) -> Interval:
    if isinstance(other, Interval):
        raise UnsupportedOperation("div by a value that depends on the image")
    return _mul(one, 1 / torch.as_tensor(other, dtype=one.dtype, device=one.device))


def _cat(parts: Sequence[Any], dim: int = 0) -> Interval:
    intervals = [part if isinstance(part, Interval) else Interval(part, part, part) for part in parts]
    return Interval(
        torch.cat([part.clean for part in intervals], dim),
        torch.cat([part.lower for part in intervals], dim),
        torch.cat([part.upper for part in intervals], dim),
    )


def _chunk(inputs: Interval, chunks: int, dim: int = 0) -> tuple[Interval, ...]:
    parts = (torch.chunk(values, chunks, dim) for values in (inputs.clean, inputs.lower, inputs.upper))
    return tuple(Interval(*values) for values in zip(*parts, strict=True))


def _batch_norm(
    inputs: Interval,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    """The affine map of the running statistics, or of the clean values' own in training mode, which counts them."""
    clean = F.batch_norm(inputs.clean, running_mean, running_var, weight, bias, training, momentum, eps)
    shape = (1, -1, *[1] * (inputs.dim() - 2))
    if training or running_mean is None or running_var is None:
        over = [0, *range(2, inputs.dim())]
        var, mean = torch.var_mean(inputs.clean.float(), over, correction=0)
    else:
        mean, var = running_mean, running_var
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    scale, shift = scale.view(shape).to(clean.dtype), shift.view(shape).to(clean.dtype)
    ends = inputs.lower * scale, inputs.upper * scale
    return Interval(clean, torch.minimum(*ends) + shift, torch.maximum(*ends) + shift)


def _identity(inputs: Interval, *args: Any, **kwargs: Any) -> Interval:
    return inputs


RULES: dict[str, Rule] = {
    **{name: _affine(getattr(F, name)) for name in ("linear", "conv1d", "conv2d", "conv3d")},
    **{
        name: _unary(getattr(F, name))
        for name in ("hardtanh", "sigmoid", "tanh", "softplus", "elu", "selu", "celu", "logsigmoid")
    },
    **{name: _relu(getattr(F, name)) for name in ("relu", "relu6")},
    "relu_": _relu(F.relu),
    **{name: _unary(getattr(torch, name)) for name in ("clamp", "sum", "mean", "exp")},
    **{
        name: _pool(getattr(F, name))
        for kind in ("avg", "max")
        for name in (f"{kind}_pool1d", f"{kind}_pool2d", f"{kind}_pool3d", f"adaptive_{kind}_pool2d")
    },
    **{name: _reshape(getattr(Tensor, name)) for name in ("flatten", "reshape", "view")},
    **{
        name: _unary(getattr(Tensor, name))
        for name in ("permute", "transpose", "squeeze", "unsqueeze", "contiguous", "float", "to")
    },
    "pad": _unary(F.pad),
    "leaky_relu": _leaky_relu,
    "dropout": _dropout,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "true_divide": _div,
    "neg": _neg,
    "cat": _cat,
    "chunk": _chunk,
    "batch_norm": _batch_norm,
    "detach": _identity,
}
