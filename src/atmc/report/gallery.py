"""A PNG of adversarial examples: clean, perturbation enlarged, adversarial, with what the model says."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from atmc.report.pictures import Example, change_picture, change_scale, predicted
from atmc.robust.attacks import attack_mode
from atmc.robust.threats import Threat

SIDE, MARGIN, LINE = 112, 8, 14  # pixels: of a picture's longer side at least, between pictures, of a line of text
HEADS = ("clean", "change", "attacked")


@torch.no_grad()
def chosen(model: nn.Module, clean: Tensor, adv: Tensor, labels: Tensor, *, count: int = 8) -> list[Example]:
    """The first examples that were right and then fooled, as far as there are.

    Args:
        clean, adv: (n, c, h, w) in [0, 1], on the CPU; adv is clean where nothing fooled it.
        labels: (n,).
    """
    changed = (clean != adv).flatten(1).any(1).nonzero()[:count, 0].tolist()
    if not changed:
        return []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with attack_mode(model):
        before, after = (model(x[changed].to(device)).float().softmax(1).cpu() for x in (clean, adv))
    rows = enumerate(changed)
    return [Example(i, int(labels[i]), clean[i], adv[i], before[j], after[j]) for j, i in rows]


def gallery(examples: Sequence[Example], threat: Threat, *, class_names: Sequence[str] = ()) -> bytes:
    """One row an example, three pictures a row, as PNG.

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("no image was fooled, so there is nothing to draw")
    tall, wide = examples[0].clean.shape[1:]
    scale = max(1, -(-SIDE // max(tall, wide)))
    tall, wide = tall * scale, wide * scale
    row = tall + MARGIN + 2 * LINE
    font = ImageFont.load_default()
    sheet = Image.new("RGB", (3 * (wide + MARGIN) + MARGIN, LINE + MARGIN + row * len(examples)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(HEADS):
        draw.text((MARGIN + column * (wide + MARGIN), 2), head, fill="black", font=font)
    for i, example in enumerate(examples):
        top, enlarged = LINE + MARGIN + i * row, change_scale(example, threat)
        pictures = (example.clean, change_picture(example, enlarged), example.adv)
        said = (_said(example.before, class_names), f"full = {enlarged:.3g}", _said(example.after, class_names))
        for column, (picture, text) in enumerate(zip(pictures, said, strict=True)):
            left = MARGIN + column * (wide + MARGIN)
            sheet.paste(_enlarged(picture, scale), (left, top))
            wrong = column == 2 and example.fooled
            draw.text((left, top + tall + 1), text, fill="#b00020" if wrong else "black", font=font)
        draw.text((MARGIN, top + tall + LINE), f"image {example.index}", fill="gray", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _said(outputs: Tensor, names: Sequence[str]) -> str:
    label = predicted(outputs)
    if label < 0:
        return "no class"
    name = names[label] if label < len(names) else str(label)
    return f"{name[:14]} {float(outputs[label]):.0%}"


def _enlarged(picture: Tensor, scale: int) -> Image.Image:
    shown = picture[:3] if len(picture) >= 3 else picture[:1].expand(3, -1, -1)
    whole = F.interpolate(shown[None], scale_factor=scale, mode="nearest")[0]
    return Image.fromarray((whole.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
