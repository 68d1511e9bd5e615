"""A run folder -> report.html: one page that opens offline, with figures, curves, layers and adversarial examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from atmc.core.files import write_beside
from atmc.data import Images
from atmc.pack.inspect import inspection
from atmc.report import pictures, svg
from atmc.report.layers import layers_section
from atmc.report.markup import cut, element, escape, page, section, table
from atmc.robust.threats import Threat

NAME = 28  # letters of a class name below a picture
SPACE = "\u00a0"  # before a percent sign: one that does not break


def write_report(
    folder: Path,
    metrics: Mapping[str, Any],
    model: nn.Module,
    test: Images,
    *,
    threat: Threat,
    steps: int,
    config_toml: str,
    class_names: Sequence[str] = (),
) -> None:
    """Write report.html of a finished run.

    Args:
        folder: holds model.atmc, and log.jsonl unless nothing was trained.
        metrics: as in metrics.json.
        model: decoded from model.atmc, plain, on the CPU; left as it was.
        test: the test split.
        threat: the perturbations that the drawn examples are made within.
        steps: steps of the PGD that makes them, each of 1.25 eps / steps.
        config_toml: the text of the folder's config.toml.
        class_names: shown in place of the classes' numbers.
    """
    examples = pictures.adversarial_examples(model, test, threat, steps=steps)
    log = folder / "log.jsonl"
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    sections = [
        _head(metrics),
        section("Result", _accuracies(metrics), _checks(metrics), _sizes(metrics)),
        section("Training", _training(records)),
        section("Layers", layers_section(inspection(folder / "model.atmc"))),
        section("Adversarial examples", _examples(examples, threat, class_names)),
        section("Run it again", _again(config_toml)),
    ]
    title = f"{metrics['model']} on {metrics['data']}, {metrics['threat']}"
    write_beside(folder / "report.html", page(title, *sections, style=svg.STYLE).encode())


def _percent(share: float) -> str:
    return f"{share * 100:.2f}{SPACE}%"


def _size(count: int) -> str:
    """Bytes as a person says them."""
    for unit, name in ((1_000_000, "MB"), (1000, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def _head(metrics: Mapping[str, Any]) -> str:
    size, clean = metrics["file_bytes"], metrics["clean"]
    factor = metrics["dense_file_bytes"] / size
    small = f"{factor:,.1f} times smaller than" if factor >= 1.05 else "about as large as"
    text = (
        f"A model file of {size:,} bytes, {small} dense float32 weights, classifies"
        f" {_percent(clean['accuracy'])} of {clean['n']:,} test images right"
    )
    tiles = [(_percent(clean["accuracy"]), "clean accuracy")]
    if metrics["attacks"]:
        name, worst = min(metrics["attacks"].items(), key=lambda item: float(item[1]["accuracy"]))
        several = "the worst of the attacks tried, " if len(metrics["attacks"]) > 1 else ""
        ball = f" within {metrics['threat']}" if "eps" in worst else ""
        text += f"; under {several}{name}{ball}, {_percent(worst['accuracy'])} of {worst['n']:,}"
        tiles.append((_percent(worst["accuracy"]), f"accuracy under {name}"))
    tiles += [(_size(size), "model file"), (f"{factor:,.1f}×", "smaller than dense float32")]
    boxes = [element("div", element("b", escape(v)), element("span", escape(k)), class_="tile") for v, k in tiles]
    return element(
        "header",
        element("h1", escape(f"{metrics['model']} on {metrics['data']}")),
        element("p", escape(f"{metrics['method']} · {metrics['threat']} · seed {metrics['seed']}"), class_="soft"),
        element("p", escape(f"{text}."), class_="lead"),
        element("div", *boxes, class_="tiles"),
    )


def _accuracies(metrics: Mapping[str, Any]) -> str:
    rows, attacks = [], []
    for name, found in (("clean", metrics["clean"]), *metrics["attacks"].items()):
        low, high = found["ci95"]
        settings = {key: value for key, value in found.items() if key not in ("accuracy", "n", "ci95")}
        bounds = f"{low * 100:.2f} to {_percent(high)}"
        drawn = svg.interval(found["accuracy"], low, high)
        rows.append([escape(name), _percent(found["accuracy"]), bounds, drawn, f"{found['n']:,}"])
        if settings:
            attacks.append(element("li", element("b", escape(name)), escape(f": {_settings(settings)}")))
    header = ("images", "accuracy", "95 % interval", "0 to 100 %", "n")
    note = f"On the test split, by the model decoded from {metrics['evaluated_on']}. Intervals are Wilson's."
    listed = element("ul", *attacks, class_="soft") if attacks else ""
    whole = table(header, rows, ("name", "num", "num", "drawn", "num"))
    return whole + element("p", escape(note), class_="soft") + listed


def _settings(settings: Mapping[str, Any]) -> str:
    """'eps 0.2, steps 16, random start no'."""

    def say(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"({_settings(value)})"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.5g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{key.replace('_', ' ')} {say(value)}" for key, value in settings.items())


def _checks(metrics: Mapping[str, Any]) -> str:
    """The evaluation's doubts about itself, where they were looked into."""
    words = {True: "passed", False: "failed", None: "not run"}
    checks = metrics.get("checks", ())
    rows = [[escape(c["name"]), words[c["ok"]], escape(str(c.get("detail", "")))] for c in checks]
    failed = [str(check["name"]) for check in checks if check["ok"] is False]
    text = f"WARNING: do not trust the accuracies under attack. Failed checks of the evaluation: {', '.join(failed)}."
    warning = element("p", element("b", escape(text), class_="bad")) if failed else ""
    return warning + table(("check", "outcome", "detail"), rows, ("name", "", "text")) if rows else ""


def _sizes(metrics: Mapping[str, Any]) -> str:
    size, dense, chosen = metrics["file_bytes"], metrics["dense_file_bytes"], metrics["validation"]
    share = metrics["nonzeros"] / metrics["dense_weights"]
    accuracies = f"{_percent(chosen['clean']['accuracy'])} clean, {_percent(chosen['pgd']['accuracy'])} under pgd"
    small = {
        "file": f"{size:,} bytes" + (f" of at most {metrics['max_bytes']:,}" if metrics.get("max_bytes") else ""),
        "dense float32 file": f"{dense:,} bytes, {dense / size:,.1f} times the file",
        "nonzeros": f"{metrics['nonzeros']:,} of {metrics['dense_weights']:,} weights ({share * 100:.3g}{SPACE}%)",
        "nominal size": f"{metrics['nominal_bits']:,} bits (values only, as the paper counts)",
        "nominal ratio": f"{metrics['nominal_ratio']:.5f}",
        "codebook": "none, plain values" if metrics["bits"] is None else f"{metrics['bits']:g} bits a value",
    }
    run = {
        "validation": accuracies,
        "values rounded to fp16": _rounding(chosen),
        "batch norm re-estimated": "yes, validation better" if chosen["batch_norm_reestimated"] else "no",
        "seed": str(metrics["seed"]),
        "time": f"{metrics['seconds']:,.1f} s",
        "versions": ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
    }
    cells = [[[escape(key), escape(value)] for key, value in part.items()] for part in (small, run)]
    return element("div", *(table(("", ""), rows, ("label", "text")) for rows in cells), class_="two")


def _rounding(chosen: Mapping[str, Any]) -> str:
    """Whether values were rounded to float16, and why."""
    if not chosen["fp16"]:
        return "no"
    before = chosen.get("before_rounding", chosen)
    worse = any(chosen[name]["accuracy"] < before[name]["accuracy"] for name in ("clean", "pgd"))
    return "yes, for the budget, though validation is worse" if worse else "yes, validation no worse"


def _training(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return element("p", "No epoch was trained: the weights are those that were given.")
    bands = [svg.Band(name, [r["epoch"] for r in group]) for name, group in groupby(records, lambda r: str(r["phase"]))]

    def column(key: str) -> list[float | None]:
        return [record[key] for record in records]

    accuracy = {"clean": column("clean"), "under pgd": column("robust")}
    residuals = {"primal": column("primal"), "dual": column("dual")}
    charts = [
        svg.line_chart("Accuracy on the validation split", bands, accuracy, scale="percent"),
        svg.line_chart("Training loss", bands, {"loss": column("loss")}),
        svg.line_chart("Nonzeros, log scale", bands, {"nonzeros": column("nonzeros")}, scale="log"),
        svg.line_chart("ADMM residuals, log scale", bands, residuals, scale="log"),
    ]
    seconds = sum(record["seconds"] for record in records)
    trained = sum(record["epoch"] > 0 for record in records)
    images = {key: {record[key] for record in records if key in record} for key in ("clean_n", "robust_n")}
    counts = [f"{n:,} {word}" for key, word in zip(images, ("clean", "under pgd"), strict=True) for n in images[key]]
    shown = f"Validation images: {', '.join(counts)}. " if counts else ""
    text = (
        f"{trained:,} epochs, {seconds:,.1f} s. {shown}Accuracies are of the model that keeps the phase's"
        " constraints; each phase goes on from the best epoch of the one before."
    )
    return element("p", escape(text), class_="soft") + element("div", *charts, class_="two")


def _examples(examples: Sequence[pictures.Example], threat: Threat, class_names: Sequence[str]) -> str:
    if not examples:
        return element("p", f"None: the first {pictures.SEARCHED} test images hold none that is classified right.")
    gray = len(examples[0].clean) < 3
    if gray:
        down, zero, up = ("rgb(" + " ".join(f"{v * 255:.0f}" for v in c) + ")" for c in pictures.PALETTE)
        swatches = [
            element("span", class_="swatch", style=f"background:{color}") + f" {word}"
            for color, word in ((down, "darker"), (zero, "unchanged"), (up, "lighter"))
        ]
        colours = ", ".join(swatches)
    else:
        colours = "gray where unchanged, each channel brighter where raised and darker where lowered"
    fooled = sum(example.fooled for example in examples)
    text = (
        f"{len(examples)} test images that the model has right before the attack, {fooled} of which fool it after"
        f" (chosen to show both; the table above has the shares). The attack is {threat} pgd as in the evaluation."
        " The change is enlarged, full strength being the value said below it: "
    )
    cards = [_card(example, threat, class_names) for example in examples]
    return element("p", escape(text), colours, ".", class_="soft") + element("div", *cards, class_="two")


def _card(example: pictures.Example, threat: Threat, class_names: Sequence[str]) -> str:
    def name(label: int) -> str:
        return class_names[label] if 0 <= label < len(class_names) else str(label) if label >= 0 else "no class"

    def verdict(outputs: Any) -> str:
        label = pictures.predicted(outputs)
        sure = f", {float(outputs[label]) * 100:.0f}{SPACE}%" if label >= 0 else ""
        kind = "good" if label == example.label else "bad"
        return element("b", escape(f"{cut(name(label), NAME)}{sure}"), class_=kind, title=name(label))

    scale = pictures.change_scale(example, threat)
    shown = [
        (example.clean, "clean", verdict(example.before)),
        (pictures.change_picture(example, scale), "change", f"±{scale:.3g}"),
        (example.adv, "attacked", verdict(example.after)),
    ]
    images = [f'<img src="{pictures.data_uri(image)}" alt="{word} image">' for image, word, _ in shown]
    captions = [element("div", word, class_="soft") + said for _, word, said in shown]
    cells = [element("div", *pair) for pair in zip(images, captions, strict=True)]
    outcome = element("span", "fooled", class_="bad") if example.fooled else element("span", "holds", class_="good")
    title = element("h3", element("span", escape(f"{name(example.label)} (test image {example.index})")), outcome)
    return element("div", title, element("div", *cells, class_="three"), class_="card")


def _again(config_toml: str) -> str:
    command = "atmc compress --config config.toml --out another-folder"
    text = "The folder's config.toml is complete: it runs again to the same result on the same kind of machine."
    whole = element("details", element("summary", "config.toml"), element("pre", escape(config_toml)))
    return element("p", text) + element("pre", command) + whole
