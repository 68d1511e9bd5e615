"""Re-estimate batch norm statistics after training, and restore them after a model file was read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atmc.compress.factorize import cached_weights
from atmc.core.modules import copy_module
from atmc.core.rng import Noise, derived_seed
from atmc.core.torch_state import seeded_generators
from atmc.data import Images
from atmc.models.batch_norm import is_affine
from atmc.robust.attacks import BATCH_NORMS
from atmc.robust.objectives import Objective, TrainingAttack
from atmc.training.loop import Loop, autocast


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, train: Images, loop: Loop, *, objective: Objective, attack: TrainingAttack
) -> bool:
    """Recompute running statistics over one epoch, in place, with the objective's clean and adversarial passes.

    Means over all images that pass replace the running averages. The attack sees the model as it was.

    Returns:
        True; False if the model has no batch norm with running statistics, and nothing was done.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.track_running_stats]
    if not norms:
        return False
    before = copy_module(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    hooks = [norm.register_forward_pre_hook(_MeanOverImages()) for norm in norms]
    model.train()
    with cached_weights(model), cached_weights(before):  # no weight changes
        for step, batch in enumerate(loop.batches(train, epoch=0)):
            noise = Noise(batch.index, seed=loop.seed, purpose="batch norm")
            device = batch.x.device
            with seeded_generators(derived_seed(loop.seed, 0, step), device), autocast(device, loop.recipe.bf16):
                objective(model, batch.x, batch.y, attack.on(before, noise))
    for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
        norm.momentum = momentum
        hook.remove()
    model.eval()
    return True


@torch.no_grad()
def restore_batch_norm(model: nn.Module, images: Images, *, n: int = 2000, batch_size: int = 250) -> bool:
    """Give the batch norms of a decoded model file running statistics again, in place, so that it can be trained.

    A file holds only a scale and a shift (`models.batch_norm.make_affine`). Here every norm gets the statistics of its
    input over the first n images, and the weight and bias with which it computes the same as before in evaluation
    mode, up to rounding. Otherwise the first pass in training mode would change the network's output.

    Returns:
        True; False if the batch norms are not affine, and nothing was done.
    """
    if not is_affine(model):
        return False
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    sums = {norm: _Moments() for norm in norms}
    hooks = [norm.register_forward_pre_hook(sums[norm]) for norm in norms]
    model.eval()
    for start in range(0, min(n, len(images)), batch_size):
        index = torch.arange(start, min(start + batch_size, n, len(images)), device=images.labels.device)
        model(images.float_pixels(index))
    for hook in hooks:
        hook.remove()
    for norm, moments in sums.items():
        mean, var = moments.mean_and_variance()
        assert norm.running_mean is not None  # an affine norm has them
        assert norm.running_var is not None
        norm.bias.copy_(norm.bias.double() + norm.weight.double() * mean)
        norm.weight.copy_(norm.weight.double() * (var + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return True


class _Moments:
    """A forward pre-hook that sums a norm's input and its squares, per channel, in float64."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, torch.zeros(()), torch.zeros(())

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double().transpose(0, 1).flatten(1)
        self._count += x.shape[1]
        self._sum = self._sum.to(x) + x.sum(1)
        self._squares = self._squares.to(x) + x.square().sum(1)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Return both per channel."""
        mean = self._sum / self._count
        return mean, (self._squares / self._count - mean**2).clamp_min(0)


class _MeanOverImages:
    """A forward pre-hook that sets a norm's momentum so that its running statistics are the mean over all images."""

    def __init__(self) -> None:
        self._seen = 0

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen += len(inputs[0])
        norm.momentum = len(inputs[0]) / self._seen  # type: ignore[assignment]
