"""Adversarial examples to look at: their selection, and their pictures as PNG data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from atmc.data import Images
from atmc.robust.attacks import PgdSettings, attack_mode
from atmc.robust.threats import Threat

AT_ONCE, SEARCHED = 16, 64  # images that are attacked at once, and in all
PALETTE = ((0.13, 0.40, 0.67), (0.97, 0.97, 0.97), (0.90, 0.38, 0.0))  # darker, unchanged and lighter gray pixels


@dataclass(frozen=True, eq=False, kw_only=True)
class Example:
    """A test image that is classified correctly, and the image that an attack made of it.

    Args:
        index: its row in the test split.
        label: its true class.
        clean, adv: (c, h, w) float32 in [0, 1].
        before, after: softmax outputs (classes,) for clean and adv.
    """

    index: int
    label: int
    clean: Tensor
    adv: Tensor
    before: Tensor
    after: Tensor

    @property
    def fooled(self) -> bool:
        """Whether the attack changed the predicted class, or made outputs that are not finite."""
        return predicted_class(self.after) != self.label


def predicted_class(outputs: Tensor) -> int:
    """Return the class of softmax outputs, -1 if they are not finite."""
    return int(outputs.argmax()) if bool(outputs.isfinite().all()) else -1


def select_examples(
    model: nn.Module, test: Images, threat: Threat, pgd: PgdSettings, *, count: int = 8
) -> list[Example]:
    """Attack test images that the model classifies correctly, and return up to `count` of them.

    Half of them are fooled and half are not, as far as the first `SEARCHED` images allow; different classes come first.

    Args:
        model: on the CPU; left as it was.
        pgd: settings of the attack, which starts at the image.
    """
    test = test.take(slice(0, SEARCHED)).to("cpu")
    examples: list[Example] = []
    for start in range(0, len(test), AT_ONCE):
        examples += _attack(model, test, list(range(start, min(start + AT_ONCE, len(test)))), threat, pgd)
        fooled_count = sum(example.fooled for example in examples)
        if min(fooled_count, len(examples) - fooled_count) >= (count + 1) // 2:
            break
    fooled = _alternate_classes(example for example in examples if example.fooled)
    others = _alternate_classes(example for example in examples if not example.fooled)
    half = max(count // 2, count - len(others))
    selected = fooled[:half]
    return selected + others[: count - len(selected)]


def _attack(model: nn.Module, test: Images, rows: list[int], threat: Threat, pgd: PgdSettings) -> list[Example]:
    """Attack the images of these rows that the model classifies correctly."""
    x, y = test.float_pixels(rows), test.labels[rows]
    before = _softmax(model, x)
    kept = [i for i in range(len(rows)) if predicted_class(before[i]) == int(y[i])]
    if not kept:
        return []
    adv = pgd.attack(model, x[kept], y[kept], threat)
    after = _softmax(model, adv)
    return [
        Example(index=rows[i], label=int(y[i]), clean=x[i], adv=adv[j], before=before[i], after=after[j])
        for j, i in enumerate(kept)
    ]


@torch.no_grad()
def _softmax(model: nn.Module, x: Tensor) -> Tensor:
    """Return softmax outputs (n, classes) in evaluation mode."""
    with attack_mode(model):
        logits: Tensor = model(x)
    return torch.softmax(logits.float(), 1)


def _alternate_classes(examples: Iterable[Example]) -> list[Example]:
    """Order examples so that the first of each class comes first, then the second of each, and so on."""
    counts: dict[int, int] = {}
    ranked = []
    for example in examples:
        counts[example.label] = counts.get(example.label, 0) + 1
        ranked.append((counts[example.label], example.index, example))
    return [example for _, _, example in sorted(ranked, key=lambda entry: entry[:2])]


def change_scale(example: Example, threat: Threat) -> float:
    """Return the change of a pixel that is drawn at full strength: eps for linf, otherwise the largest change."""
    return threat.eps if threat.name == "linf" else float((example.adv - example.clean).abs().max()) or threat.eps


def change_picture(example: Example, scale: float) -> Tensor:
    """Return the change as colors, (3, h, w) in [0, 1], clipped at scale.

    For a gray image `PALETTE` has the colors of -scale, 0 and scale; for a color image it is 1/2 + change / (2 scale).
    """
    change: Tensor = (_visible(example.adv) - _visible(example.clean)).div(scale).clamp(-1, 1)
    if len(change) == 3:
        return 0.5 + change / 2
    colors = torch.tensor(PALETTE)[:, :, None, None]
    down, zero, up = colors[0], colors[1], colors[2]
    return zero + change.clamp(min=0) * (up - zero) + change.clamp(max=0).abs() * (down - zero)


def _visible(image: Tensor) -> Tensor:
    """Return the channels that a picture can show: the first 3, or the first if there are fewer."""
    return image[:3] if len(image) >= 3 else image[:1]


def data_uri(image: Tensor) -> str:
    """Return an image (c, h, w) in [0, 1] as a PNG data URI: the first 3 channels as RGB, or the first as gray."""
    levels = (_visible(image).clamp(0, 1) * 255).round().to(torch.uint8)
    array = levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
