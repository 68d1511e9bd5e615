"""Adversarial examples to look at: choosing them, and their pictures as PNG data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from atmc.data import Images
from atmc.robust.attacks import attack_mode, pgd
from atmc.robust.threats import Threat

AT_ONCE, SEARCHED = 16, 64  # images attacked in one go, and at most
PALETTE = ((0.13, 0.40, 0.67), (0.97, 0.97, 0.97), (0.90, 0.38, 0.0))  # of a gray change: blue, near white, orange


@dataclass(frozen=True, eq=False)
class Example:
    """A test image that is classified right, and what the attack made of it.

    Args:
        index: its row in the test split.
        label: its true class.
        clean, adv: (c, h, w) float32 in [0, 1].
        before, after: softmax outputs for both, (classes,).
    """

    index: int
    label: int
    clean: Tensor
    adv: Tensor
    before: Tensor
    after: Tensor

    @property
    def fooled(self) -> bool:
        """Whether the attack changed the predicted class (or the outputs are no numbers any more)."""
        return predicted(self.after) != self.label


def predicted(outputs: Tensor) -> int:
    """The class of softmax outputs, -1 where they are not numbers."""
    return int(outputs.argmax()) if bool(outputs.isfinite().all()) else -1


def adversarial_examples(
    model: nn.Module, test: Images, threat: Threat, *, steps: int, count: int = 8
) -> list[Example]:
    """Up to `count` test images that the model has right, with what `pgd` of the evaluation makes of them.

    Half of them fooled, half not, as far as the first `SEARCHED` images hold them; of each kind different classes
    first. The attack is the one of `robust_accuracy`: steps of 1.25 eps / steps, from the image, last iterate.

    Args:
        model: on the CPU; left as it was.
        steps: of the attack, at least 1.
    """
    test = test.take(slice(0, SEARCHED)).to("cpu")
    found: list[Example] = []
    for start in range(0, len(test), AT_ONCE):
        found += _attacked(model, test, list(range(start, min(start + AT_ONCE, len(test)))), threat, steps)
        fooled = sum(example.fooled for example in found)
        if min(fooled, len(found) - fooled) >= (count + 1) // 2:
            break
    fooled_ones = _varied(example for example in found if example.fooled)
    others = _varied(example for example in found if not example.fooled)
    half = max(count // 2, count - len(others))
    chosen = fooled_ones[:half]
    return chosen + others[: count - len(chosen)]


def _attacked(model: nn.Module, test: Images, rows: list[int], threat: Threat, steps: int) -> list[Example]:
    """The examples among rows that the model has right."""
    x, y = test.float_pixels(rows), test.labels[rows]
    before = _softmax(model, x)
    kept = [i for i in range(len(rows)) if predicted(before[i]) == int(y[i])]
    if not kept:
        return []
    adv = pgd(model, x[kept], y[kept], threat, steps=steps, step_size=1.25 * threat.eps / steps)
    after = _softmax(model, adv)
    return [Example(rows[i], int(y[i]), x[i], adv[j], before[i], after[j]) for j, i in enumerate(kept)]


@torch.no_grad()
def _softmax(model: nn.Module, x: Tensor) -> Tensor:
    with attack_mode(model):
        logits: Tensor = model(x)
    return torch.softmax(logits.float(), 1)


def _varied(examples: Iterable[Example]) -> list[Example]:
    """In order, but one of each class first, then a second of each, and so on."""
    seen: dict[int, int] = {}
    ranked = []
    for example in examples:
        seen[example.label] = seen.get(example.label, 0) + 1
        ranked.append((seen[example.label], example.index, example))
    return [example for _, _, example in sorted(ranked, key=lambda entry: entry[:2])]


def change_scale(example: Example, threat: Threat) -> float:
    """The change of a pixel that the picture of the change shows at full strength: eps for linf, else the largest."""
    return threat.eps if threat.name == "linf" else float((example.adv - example.clean).abs().max()) or threat.eps


def change_picture(example: Example, scale: float) -> Tensor:
    """The change as colours, (3, h, w) in [0, 1], clipped at scale.

    Of a gray image: from `PALETTE`, by -scale, 0 and scale. Of a coloured one: 1/2 + change / (2 scale).
    """
    change: Tensor = (_visible(example.adv) - _visible(example.clean)).div(scale).clamp(-1, 1)
    if len(change) == 3:
        return 0.5 + change / 2
    colours = torch.tensor(PALETTE)[:, :, None, None]
    down, zero, up = colours[0], colours[1], colours[2]
    return zero + change.clamp(min=0) * (up - zero) + change.clamp(max=0).abs() * (down - zero)


def _visible(image: Tensor) -> Tensor:
    """What a picture can hold: 3 channels, or 1 where there are fewer."""
    return image[:3] if len(image) >= 3 else image[:1]


def data_uri(image: Tensor) -> str:
    """A PNG, pixel for pixel, of (c, h, w) in [0, 1]: the first 3 channels as RGB, or the first as gray."""
    levels = (_visible(image).clamp(0, 1) * 255).round().to(torch.uint8)
    array = levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
