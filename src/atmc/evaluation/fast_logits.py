"""Logits for attacks that need no gradients: by the sparse engine, if the model is sparse, which is far faster.

Whatever such an attack returns is classified by the module itself before it counts (`evaluation.accuracy`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from atmc.deploy.engine.engine import SPARSE_ENOUGH, Engine
from atmc.robust.attacks import attack_mode


def choose_logits(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function from images (n, c, h, w) to the model's logits (n, classes) in evaluation mode.

    It is the engine on one thread if the model is on the CPU, can be traced, has at most a quarter of its
    multiply-adds left, and the engine's logits on the images x (n, c, h, w) are those of the module up to rounding;
    otherwise it is the module. Nothing is timed, so the choice is the same every time.
    """

    def run_module(images: Tensor) -> Tensor:
        with attack_mode(model), torch.no_grad():
            logits: Tensor = model(images)
        return logits.float()

    if x.device.type != "cpu":
        return run_module
    try:
        engine = Engine(model, threads=1, prefer="sparse", input_shape=(x.shape[1], x.shape[2], x.shape[3]))
    except ValueError:  # an operation that the engine does not know
        return run_module

    def run_engine(images: Tensor) -> Tensor:
        return torch.from_numpy(engine(np.ascontiguousarray(images.numpy())))

    sparse = engine.graph.macs() <= SPARSE_ENOUGH * engine.graph.macs(dense=True)
    return run_engine if sparse and torch.allclose(run_engine(x), run_module(x), rtol=1e-3, atol=1e-3) else run_module
