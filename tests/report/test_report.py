"""The report of a run: its page in every kind of run, its charts' geometry, its adversarial examples."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from atmc.commands.config import RunConfig, parse
from atmc.compress.constraints import Codebook
from atmc.compress.factorize import compressible_parameters, cut_ranks, factorize
from atmc.data import Images
from atmc.pack import artifact
from atmc.pack.inspect import inspect_file
from atmc.report import pictures
from atmc.report.axes import Axis, linear_ticks, log_ticks, short
from atmc.report.layers import list_layers
from atmc.report.markup import cut, element
from atmc.report.report import write_report
from atmc.report.svg import BESIDE, Band, Bar, bar_chart, interval, line_chart
from atmc.robust.attacks import PgdSettings
from atmc.robust.threats import L1, L2, Linf, Threat

VOID = {"meta", "img", "br"}
HOSTILE = '"><script>alert(1)</script>&amp;'
CLASSES = 4


class Page(HTMLParser):
    """A page whose elements are closed in order, with its attributes, element names and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.given: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.given += [(key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


class Net(nn.Module):
    """A linear classifier after a fixed convolution that returns the image."""

    def __init__(self, channels: int = 1, side: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.head = nn.Linear(channels * side * side, CLASSES)
        generator = torch.Generator().manual_seed(channels)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(channels)[:, :, None, None])
            self.conv.bias.zero_()
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=generator))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(x).flatten(1))
        return logits


def draw_labeled(model: nn.Module, n: int = 48, channels: int = 1, side: int = 6, wrong: int = 0) -> Images:
    """Draw images with the model's own predictions as labels, except for the first `wrong` ones."""
    x = (torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(5)) * 255).round() / 255
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % CLASSES
    return Images((x * 255).round().to(torch.uint8), y)


def record(phase: str, epoch: int, **changed: Any) -> dict[str, Any]:
    line = {"phase": phase, "epoch": epoch, "loss": 1.5 / (epoch or 1) if epoch else None, "clean": 0.9, "robust": 0.5}
    line |= {"nonzeros": 77, "nominal_bits": 2464, "primal": None, "dual": None, "seconds": 1.25}
    return line | changed


def accuracy(value: float, n: int = 48, **settings: Any) -> dict[str, Any]:
    return {"accuracy": value, "n": n, "ci95": [value - 0.0512, value + 0.0123], **settings}


def metrics_of(config: RunConfig, size: int, **changed: Any) -> dict[str, Any]:
    metrics = {name: getattr(config, name) for name in ("method", "model", "data", "threat", "seed", "bits")}
    pgd = accuracy(0.3125, eps=0.1, steps=16, step_size=0.0078125, random_start=False, restarts=1, loss="ce", seed=0)
    validation = {
        "clean": accuracy(0.875, 24),
        "pgd": accuracy(0.4375, 24),
        "fp16": True,
        "batch_norm_reestimated": False,
    }
    metrics |= {"file_bytes": size, "dense_file_bytes": 1234567, "nominal_bits": 2464, "nominal_ratio": 0.53472}
    metrics |= {"nonzeros": 77, "dense_weights": 144, "clean": accuracy(0.9375), "attacks": {"pgd": pgd}}
    metrics |= {"validation": validation, "evaluated_on": "model.atmc", "seconds": 81.2, "versions": {"atmc": "9.8.7"}}
    return metrics | changed


def make_config(**changed: Any) -> RunConfig:
    return parse({"model": "lenet", "data": "digits", "threat": "linf:0.1", "ratio": 0.5} | changed)


def report(
    folder: Path,
    records: list[dict[str, Any]] | None,
    *,
    model: nn.Module | None = None,
    channels: int = 1,
    class_names: tuple[str, ...] = (),
    test: Images | None = None,
    config: RunConfig | None = None,
    **changed: Any,
) -> Page:
    """Write the report of an invented run of a small model; return the page, checked."""
    config = config or make_config()
    size = artifact.save(model or Net(channels), folder / "model.atmc", input_shape=(channels, 6, 6), classes=CLASSES)
    if records is not None:
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    plain = artifact.load(folder / "model.atmc", factory=lambda num_classes: Net(channels))
    images = test or draw_labeled(plain, channels=channels)
    write_report(
        folder,
        metrics_of(config, size, **changed),
        plain,
        images,
        threat=config.parsed_threat(),
        pgd=PgdSettings.paper(config.parsed_threat(), steps=config.steps),
        config_toml=config.to_toml(),
        class_names=class_names,
    )
    written = (folder / "report.html").read_text(encoding="utf-8")
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    return Page(written)


THREE = [record("dense", 1), record("dense", 2), record("l0", 1)]
THREE += [record("admm", e, primal=0.5 / e, dual=0.1) for e in (1, 2)] + [record("tune", 0), record("tune", 1)]
RUNS: dict[str, dict[str, Any]] = {
    "three phases": {"records": THREE},
    "natural": {"records": [record("dense", 1), record("l0", 1)], "config": make_config(method="nap")},
    "residuals of zero": {"records": [record("admm", 1, primal=0.0, dual=0.0)]},
    "no epochs in tune": {"records": [record("dense", 1), record("tune", 0)]},
    "dense": {"records": [record("dense", e) for e in range(1, 4)], "config": make_config(method="da", ratio=None)},
    "one epoch": {"records": [record("dense", 1)]},
    "300 epochs": {"records": [record("dense", e) for e in range(1, 301)] + [record("tune", 1)]},
    "nothing trained": {"records": None},
    "empty log": {"records": []},
    "colored": {"records": THREE, "channels": 3},
    "two channels": {"records": THREE, "channels": 2},
    "codebook": {"records": THREE, "config": make_config(bits=4)},
    "no attack": {"records": THREE, "attacks": {}},
    "l1": {"records": THREE, "config": make_config(threat="l1:1.5")},
    "tiny loss, no nonzeros": {"records": [record("dense", 1, loss=1e-14, nonzeros=0), record("dense", 2, loss=0.0)]},
    "ranks": {"records": THREE, "model": cut_ranks(Net(), {"conv.weight": 1, "head.weight": 2})},
}


@pytest.mark.parametrize("kind", RUNS)
def test_page_stands_alone_and_is_well_formed(kind: str, tmp_path: Path) -> None:
    page = report(tmp_path, **RUNS[kind])
    for key, value in page.given:
        assert not value.lower().startswith(("http", "//", "file", "javascript"))
        assert not key.startswith("on")
        if key in ("src", "href"):
            assert value.startswith("data:image/png;base64,")
    assert not {"script", "link", "iframe", "object"} & set(page.names)
    for section in ("Result", "Training", "Layers", "Adversarial examples", "Run it again"):
        assert section in page.text
    assert not re.search(r"\b(nan|inf|None\b(?!:))", page.text)


def test_figures_of_the_run_are_on_the_page(tmp_path: Path) -> None:
    config = make_config(bits=4, seed=3)
    page = report(tmp_path, THREE, config=config)
    size = (tmp_path / "model.atmc").stat().st_size
    expected = ["93.75 %", "31.25 %", "26.13 to 32.48 %", "eps 0.1, steps 16", "random start no", "87.50 % clean"]
    expected += [f"{size:,} bytes", f"1,234,567 bytes, {1234567 / size:,.1f} times", "77 of 144 weights", "0.53472"]
    expected += ["4 bits per value", "81.2 s", "atmc 9.8.7", "seed 3", "yes, validation no worse", "6 epochs, 8.8 s"]
    expected += ["atmc compress --config config.toml"]
    for figure in expected:
        assert figure in page.text, figure
    assert re.sub(r"\s+", " ", config.to_toml()).strip() in page.text


def test_headline_names_the_worst_attack(tmp_path: Path) -> None:
    strong = accuracy(0.25, eps=0.1, **{"with": {"steps": 7}})
    attacks = {"fgsm": accuracy(0.5, eps=0.1), "pgd-strong": strong, "wrm": accuracy(0.75)}
    page = report(tmp_path, THREE, attacks=attacks)
    assert "under the worst of the attacks tried, pgd-strong within linf:0.1, 25.00 % of 48" in page.text
    assert "eps 0.1, with (steps 7)" in page.text
    best = report(tmp_path, THREE, attacks={"wrm": accuracy(0.75)}, dense_file_bytes=10)
    assert "under wrm, 75.00 % of 48" in best.text
    assert "about as large as" in best.text


def test_proofs_stand_beside_what_attacks_leave(tmp_path: Path) -> None:
    certified = accuracy(0.25, eps=0.1, by={"interval": 0.25}, undecided=0.02)
    page = report(tmp_path, THREE, certified=certified, attacked=accuracy(0.27, eps=0.1, broken_by={"clean": 0.0625}))
    assert "against every attack within linf:0.1, 25.00 % of 48 are proved." in page.text
    assert "[25.0, 27.0] % [certified, attacked] accuracy" in page.text
    assert "certified 25.00 % 19.88 to 26.23 %" in page.text
    assert "attacked 27.00 % 21.88 to 28.23 %" in page.text
    assert "by (interval 0.25), undecided 0.02" in page.text
    assert "certified" not in report(tmp_path, THREE).text


def test_checks_are_listed_where_there_are_any(tmp_path: Path) -> None:
    checks = [{"name": "zero_gradient", "ok": False, "detail": "3 of 48 are <0>"}, {"name": "square", "ok": None}]
    page = report(tmp_path, THREE, checks=checks)
    assert (
        "WARNING: do not trust the accuracies under attack. Failed checks of the evaluation: zero_gradient."
        in page.text
    )
    assert re.search(r"zero_gradient failed 3 of 48 are <0> square not run", page.text)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    config = make_config(model=f"a:{HOSTILE}", data=HOSTILE)
    lines = [record(HOSTILE, 1), record(HOSTILE, 2)]
    page = report(tmp_path, lines, config=config, class_names=(HOSTILE,) * CLASSES, versions={HOSTILE: HOSTILE})
    assert "script" not in page.names
    written = (tmp_path / "report.html").read_text()
    assert "<script" not in written
    assert page.text.count(HOSTILE) >= 4 + 8
    assert html.escape(HOSTILE, quote=True) in written


def test_classes_are_named_and_numbered(tmp_path: Path) -> None:
    page = report(tmp_path, THREE, class_names=("anna", "bert", "carl", "dora"))
    assert re.search(r"(anna|bert|carl|dora) \(test image \d+\) (fooled|holds)", page.text)
    assert re.search(r"[0-3] \(test image \d+\) (fooled|holds)", report(tmp_path, THREE).text)


def test_model_that_has_nothing_right(tmp_path: Path) -> None:
    test = draw_labeled(Net(), wrong=48)
    page = report(tmp_path, THREE, test=test)
    assert "None: none of the first 64 test images is classified correctly" in page.text
    assert "img" not in page.names


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.7), L1(2.0)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_examples_stay_in_ball_and_box(threat: Threat, channels: int) -> None:
    model = Net(channels)
    test = draw_labeled(model, channels=channels, wrong=6)
    examples = pictures.select_examples(model, test, threat, PgdSettings.paper(threat, steps=7))
    assert 1 <= len(examples) <= 8
    assert len({example.index for example in examples}) == len(examples)
    for example in examples:
        assert example.index >= 6
        assert torch.equal(example.clean, test.float_pixels([example.index])[0])
        assert example.label == int(test.labels[example.index]) == pictures.predicted_class(example.before)
        assert float(threat.distance(example.adv[None], example.clean[None])) <= threat.eps * (1 + 1e-5)
        assert 0 <= float(example.adv.min()) <= float(example.adv.max()) <= 1
        with torch.no_grad():
            after = int(model(example.adv[None]).argmax())
        assert example.fooled == (after != example.label)
        clean, adv = picture(pictures.data_uri(example.clean)), picture(pictures.data_uri(example.adv))
        assert torch.equal(clean, test.pixels[example.index])
        slack = threat.eps + 0.5 / 255 + 1e-6
        assert float((adv.float() - clean.float()).abs().max()) / 255 <= slack


def picture(uri: str) -> Tensor:
    """Return the pixels (c, h, w), uint8, of a PNG data URI."""
    with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))) as image:
        assert image.format == "PNG"
        levels = torch.tensor(list(image.tobytes()), dtype=torch.uint8)
        return levels.view(image.height, image.width, -1).permute(2, 0, 1)


class Two(nn.Module):
    """Two classes by the sum of the pixels: at most 18 is class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.training_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.training_calls += self.training
        total = x.flatten(1).sum(1)
        return torch.stack([18 - total, total - 18], 1)


def even(*values: float) -> Images:
    """Build 6x6 images of one value each, labeled by the model `Two`."""
    x = torch.tensor(values)[:, None, None, None].expand(-1, 1, 6, 6).contiguous()
    return Images(x, (torch.tensor(values) > 0.5).long())


def test_both_kinds_of_examples_are_shown() -> None:
    """An image of value v within 0.1 of 1/2 is fooled by eps 0.1, any other is not: a closed form."""
    values = [0.2, 0.8, 0.3, 0.7, 0.25, 0.75, 0.15, 0.85, 0.45, 0.55, 0.42, 0.58, 0.47, 0.53]
    model = Two().train()
    examples = pictures.select_examples(model, even(*values), Linf(0.1), PgdSettings.paper(Linf(0.1), steps=10))
    assert [example.fooled for example in examples] == [True] * 4 + [False] * 4
    assert [example.label for example in examples] == [0, 1, 0, 1] * 2
    assert all(example.fooled == (abs(values[example.index] - 0.5) < 0.1) for example in examples)
    for example in examples:
        step = 0.1 if example.label == 0 else -0.1
        assert torch.allclose(example.adv, example.clean + step, atol=1e-6)
    assert model.training
    assert model.training_calls == 0


@pytest.mark.parametrize(("near", "far"), [(12, 2), (1, 12), (0, 12), (12, 0), (3, 2)])
def test_one_kind_fills_the_place_of_the_other(near: int, far: int) -> None:
    values = [0.46 + 0.001 * i for i in range(near)] + [0.1 + 0.01 * i for i in range(far)]
    examples = pictures.select_examples(Two(), even(*values), Linf(0.1), PgdSettings.paper(Linf(0.1), steps=10))
    fooled = sum(example.fooled for example in examples)
    assert len(examples) == min(8, near + far)
    assert fooled == (min(near, 4) if far >= 4 else min(near, 8 - far))


def test_outputs_that_are_no_numbers_are_no_class() -> None:
    image, nothing = torch.zeros(1, 2, 2), torch.full((3,), math.nan)
    example = pictures.Example(index=0, label=1, clean=image, adv=image, before=torch.ones(3), after=nothing)
    assert example.fooled
    assert pictures.predicted_class(example.after) == -1


def example_of(change: Tensor) -> pictures.Example:
    clean, ones = torch.full_like(change, 0.5), torch.ones(1)
    return pictures.Example(index=0, label=0, clean=clean, adv=clean + change, before=ones, after=ones)


def test_picture_of_a_change() -> None:
    gray = example_of(torch.tensor([-0.2, 0.0, 0.1, 0.2]).view(1, 1, 4))
    down, zero, up = (torch.tensor(color) for color in pictures.PALETTE)
    shown = pictures.change_picture(gray, 0.2)
    expected = torch.stack([down, zero, (zero + up) / 2, up], 1).view(3, 1, 4)
    assert torch.allclose(shown, expected, atol=1e-5)
    colored = example_of(torch.tensor([-0.2, 0.0, 0.1]).view(3, 1, 1))
    assert torch.allclose(pictures.change_picture(colored, 0.2).flatten(), torch.tensor([0.0, 0.5, 0.75]), atol=1e-5)


def test_scale_of_a_change() -> None:
    gray = example_of(torch.tensor([-0.05, 0.0, 0.02]).view(1, 1, 3))
    assert pictures.change_scale(gray, Linf(0.1)) == 0.1
    assert pictures.change_scale(gray, L2(0.7)) == pytest.approx(0.05)
    assert pictures.change_scale(example_of(torch.zeros(1, 1, 3)), L2(0.7)) == 0.7


def test_layers_account_for_every_nonzero_and_byte(tmp_path: Path) -> None:
    model = factorize(Net(3, side=4), exclude=["conv.*"])
    tensors = compressible_parameters(model)
    with torch.no_grad():
        for name, quantized in Codebook(2).project({name: t.detach() for name, t in tensors.items()}).items():
            tensors[name].copy_(quantized)
        tensors["head.weight.U"][:, 2] = 0.5
    size = artifact.save(model, tmp_path / "model.atmc")
    inspection = inspect_file(tmp_path / "model.atmc")
    rows, rest = list_layers(inspection)
    assert [(row.name, row.shape, row.weights) for row in rows] == [("conv", (3, 3, 1, 1), 9), ("head", (4, 48), 192)]
    conv, head = rows
    assert conv.nonzeros == {"W": 3}
    assert conv.rank is None
    assert head.nonzeros == {part: int(tensors[f"head.weight.{part}"].count_nonzero()) for part in ("U", "V", "C")}
    assert head.nonzeros["U"] == 4
    assert head.rank == (1, 4)
    assert head.value_bits["V"] == "4 values, 2 bits"
    assert head.value_bits["C"] == "none"
    total = sum(sum(row.file_bytes.values()) for row in rows) + sum(rest.values())
    assert total + inspection["totals"]["metadata and checksums"] == pytest.approx(size, abs=0.01)


def test_plain_values_are_told_by_their_width(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40))
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight.half().float())
        model[2].weight[:, :36] = 0
    artifact.save(model, tmp_path / "model.atmc")
    rows, _ = list_layers(inspect_file(tmp_path / "model.atmc"))
    assert [row.value_bits["W"] for row in rows] == ["fp32", "fp16", "fp32"]


def test_rank_form_has_the_shape_of_its_product(tmp_path: Path) -> None:
    artifact.save(cut_ranks(nn.Sequential(nn.Linear(9, 5)), {"0.weight": 2}), tmp_path / "model.atmc")
    (row,), _ = list_layers(inspect_file(tmp_path / "model.atmc"))
    assert (row.shape, row.rank, row.total) == ((5, 9), (2, 2), 2 * (5 + 9))


def numbers(markup: str, name: str, attribute: str) -> list[float]:
    return [float(value) for value in re.findall(rf'<{name}[^>]* {attribute}="([-0-9.]+)"', markup)]


def test_line_chart_puts_values_where_they_belong() -> None:
    chart = line_chart("t", [Band("a", [1, 2, 3])], {"v": [0.0, 0.5, 1.0]}, scale="percent")
    Page(chart)
    grid = numbers(chart, "line", "y1")[1:]  # the first is the legend's
    y = numbers(chart, "circle", "cy")
    assert y[0] == max(grid)
    assert y[2] == min(grid)
    assert y[1] == pytest.approx((y[0] + y[2]) / 2, abs=0.1)
    x = numbers(chart, "circle", "cx")
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
    assert "50 %" not in chart.replace("50.00 %", "")  # ticks are 0, 20, ..., 100 %
    assert "v, a epoch 2: 50.00 %" in chart


def test_log_chart_gives_equal_room_to_equal_factors() -> None:
    y = numbers(line_chart("t", [Band("a", [1, 2, 3])], {"v": [10, 1000, 100_000]}, scale="log"), "circle", "cy")
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.11)


def test_lines_are_interrupted_between_phases_and_at_gaps() -> None:
    chart = line_chart("t", [Band("a", [1, 2, 3, 4]), Band("b", [0, 1])], {"v": [1.0, 2.0, None, 3.0, 4.0, 5.0]})
    paths = re.findall(r' d="([^"]*)"', chart)
    assert [path.count("M") for path in paths] == [2, 1]
    assert [len(re.findall(r"[ML]", path)) for path in paths] == [3, 2]
    assert chart.count("<circle") == 5
    assert line_chart("t", [Band("a", [1])], {"v": [None]}) == ""
    assert line_chart("t", [Band("a", [1, 2])], {"v": [0.0, math.nan]}, scale="log") == ""


def test_phases_lie_side_by_side_and_none_is_too_narrow() -> None:
    chart = line_chart("t", [Band("long", range(1, 301)), Band("short", [0])], {"v": [1.0] * 301})
    x, width = numbers(chart, "rect", "x"), numbers(chart, "rect", "width")
    assert x[0] + width[0] == pytest.approx(x[1], abs=0.11)
    assert 30 < width[1] < width[0] / 5
    at = numbers(chart, "circle", "cx")
    assert at == sorted(at)
    assert x[1] < at[-1] < x[1] + width[1]


def test_bars_are_as_long_as_their_values() -> None:
    chart = bar_chart("t", [Bar("one", {"a": 10, "b": 0}), Bar("two", {"a": 20, "b": 20})], unit="bytes")
    Page(chart)
    assert numbers(chart, "rect", "width")[2:] == pytest.approx([58.5, 117, 117], abs=0.11)  # two swatches go before
    assert "two, b: 20 bytes" in chart
    assert re.findall(r">(\d+)</text>", chart) == ["10", "40"]


def test_only_the_longest_bars_are_drawn_and_long_names_stand_above() -> None:
    bars = [Bar(f"block{i}." + "x" * 70, {"a": i}) for i in range(10)]
    chart = bar_chart("t", bars, unit="bytes", most=4)
    assert "t (the 4 largest of 10)" in chart
    assert [name in chart for name in ("block5.", "block6.", "block9.")] == [False, True, True]
    assert all(x == 0 for x in numbers(chart, "rect", "x")[1:])
    assert max(len(text) for text in re.findall(r"</title>([^<]*)</text>", chart)) <= 58
    assert 'text-anchor="end"' in bar_chart("t", [Bar("x" * BESIDE, {"a": 1})], unit="bytes")
    Page(bar_chart("t", [], unit="bytes") + bar_chart("t", [Bar("none", {"a": 0})], unit="bytes"))


def test_interval_spans_its_bounds() -> None:
    drawn = interval(0.5, 0.4, 0.7)
    assert numbers(drawn, "circle", "cx") == [65.0]
    assert (numbers(drawn, "line", "x1")[-1], numbers(drawn, "line", "x2")[-1]) == (53.0, 89.0)


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_linear_ticks_are_even_and_hold_the_range(low: float, span: float) -> None:
    ticks = linear_ticks(low, low + span)
    steps = [b - a for a, b in pairwise(ticks)]
    slack = 1e-5 * max(steps)
    assert 2 <= len(ticks) <= 12
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert all(math.isclose(step, steps[0], rel_tol=1e-3) for step in steps)


@settings(deadline=None)
@given(st.floats(1e-9, 1e12), st.floats(4, 1e9))
def test_log_ticks_lie_inside(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert 1 <= len(ticks) <= 8
    assert all(low <= tick <= low * factor for tick in ticks)
    assert ticks == sorted(ticks)
    assert factor < 10 or len(ticks) >= 3


def test_axis_of_a_constant_has_room() -> None:
    for scale in ("linear", "log"):
        axis = Axis.of([430_500.0], scale, 0.0, 100.0)
        assert 0 < axis.height(430_500.0) < 100
        assert len(axis.ticks) >= 3
    assert Axis.of([0.0], "linear", 0.0, 100.0).height(0.0) == 100.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (430_500, "430k"), (999.9, "1k"), (1e6, "1M"), (0.00025, "2.5e−4"), (2e-5, "2e−5"), (-0.5, "−0.5")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_markup_escapes_attributes() -> None:
    assert element("p", class_="a", aria_label='"<') == '<p class="a" aria-label="&quot;&lt;"></p>'
    assert cut("abcdefgh", 5) == "ab…gh"
    assert cut("abcde", 5) == "abcde"
