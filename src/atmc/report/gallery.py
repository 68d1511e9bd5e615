"""A PNG of adversarial examples: clean image, enlarged change and attacked image, with the model's answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from atmc.report.pictures import Example, change_picture, change_scale, predicted_class
from atmc.robust.attacks import attack_mode
from atmc.robust.threats import Threat

SIDE, MARGIN, LINE = 112, 8, 14  # pixels: least longer side of a picture, gap between pictures, height of a text line
HEADS = ("clean", "change", "attacked")


@torch.no_grad()
def select_fooled(model: nn.Module, clean: Tensor, adv: Tensor, labels: Tensor, *, count: int = 8) -> list[Example]:
    """Return the first `count` examples that the attack changed, or fewer if there are fewer.

    Args:
        clean, adv: (n, c, h, w) in [0, 1], on the CPU; adv equals clean for an image that no attack changed.
        labels: (n,) true classes.
    """
    changed = (clean != adv).flatten(1).any(1).nonzero()[:count, 0].tolist()
    if not changed:
        return []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with attack_mode(model):
        before, after = (model(x[changed].to(device)).float().softmax(1).cpu() for x in (clean, adv))
    rows = enumerate(changed)
    return [
        Example(index=i, label=int(labels[i]), clean=clean[i], adv=adv[i], before=before[j], after=after[j])
        for j, i in rows
    ]


def draw_gallery(examples: Sequence[Example], threat: Threat) -> bytes:
    """Draw one row of three pictures per example, as PNG; without examples a line that says so."""
    font = ImageFont.load_default()
    if not examples:
        return _draw_line("No image was fooled.", font)
    tall, wide = examples[0].clean.shape[1:]
    scale = max(1, -(-SIDE // max(tall, wide)))
    tall, wide = tall * scale, wide * scale
    row = tall + MARGIN + 2 * LINE
    sheet = Image.new("RGB", (3 * (wide + MARGIN) + MARGIN, LINE + MARGIN + row * len(examples)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(HEADS):
        draw.text((MARGIN + column * (wide + MARGIN), 2), head, fill="black", font=font)
    for i, example in enumerate(examples):
        top, enlarged = LINE + MARGIN + i * row, change_scale(example, threat)
        pictures = (example.clean, change_picture(example, enlarged), example.adv)
        answers = [_describe(outputs) for outputs in (example.before, example.after)]
        captions = (answers[0], f"full = {enlarged:.3g}", answers[1])
        for column, (picture, text) in enumerate(zip(pictures, captions, strict=True)):
            left = MARGIN + column * (wide + MARGIN)
            sheet.paste(_enlarge(picture, scale), (left, top))
            wrong = column == 2 and example.fooled
            draw.text((left, top + tall + 1), text, fill="#b00020" if wrong else "black", font=font)
        draw.text((MARGIN, top + tall + LINE), f"image {example.index}", fill="gray", font=font)
    return _to_png(sheet)


def _draw_line(text: str, font: Any) -> bytes:
    sheet = Image.new("RGB", (3 * SIDE, LINE + 2 * MARGIN), "white")
    ImageDraw.Draw(sheet).text((MARGIN, MARGIN), text, fill="black", font=font)
    return _to_png(sheet)


def _to_png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _describe(outputs: Tensor) -> str:
    """Return the predicted class and its softmax output."""
    label = predicted_class(outputs)
    return "no class" if label < 0 else f"{label} {float(outputs[label]):.0%}"


def _enlarge(picture: Tensor, scale: int) -> Image.Image:
    """Return a picture (c, h, w) in [0, 1] with every pixel as scale x scale pixels, in RGB."""
    shown = picture[:3] if len(picture) >= 3 else picture[:1].expand(3, -1, -1)
    whole = F.interpolate(shown[None], scale_factor=scale, mode="nearest")[0]
    return Image.fromarray((whole.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
