"""Write report.html into a run folder: one offline page with accuracies, curves, layers and adversarial examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from atmc.core.files import write_beside
from atmc.data import Images
from atmc.pack.inspect import inspect_file
from atmc.report import pictures, svg
from atmc.report.layers import layers_section
from atmc.report.markup import cut, element, escape, page, section, table
from atmc.robust.attacks import PgdSettings
from atmc.robust.threats import Threat
from atmc.training.settings import VAL_ATTACKS

NAME = 28  # letters of a class name below a picture
ROBUST = {"interval": "certified by intervals"} | {name: f"under the attack {name}" for name in VAL_ATTACKS}
SPACE = "\u00a0"  # a space that does not break, before a percent sign


def write_report(
    folder: Path,
    metrics: Mapping[str, Any],
    model: nn.Module,
    test: Images,
    *,
    threat: Threat,
    pgd: PgdSettings,
    config_toml: str,
    class_names: Sequence[str] = (),
) -> None:
    """Write report.html of a finished run.

    Args:
        folder: holds model.atmc, and log.jsonl unless nothing was trained.
        metrics: as in metrics.json.
        model: decoded from model.atmc, plain, on the CPU; left as it was.
        test: the test split.
        threat: of the adversarial examples on the page.
        pgd: settings of the attack that makes them.
        config_toml: the text of the folder's config.toml.
        class_names: shown in place of the classes' numbers.
    """
    examples = pictures.select_examples(model, test, threat, pgd)
    log = folder / "log.jsonl"
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    sections = [
        _head(metrics),
        section("Result", _accuracies(metrics), _checks(metrics), _sizes(metrics)),
        section("Training", _training(records, ROBUST[_robust_measure(metrics["validation"])])),
        section("Layers", layers_section(inspect_file(folder / "model.atmc"))),
        section("Adversarial examples", _examples(examples, threat, class_names)),
        section("Run it again", _again(config_toml)),
    ]
    title = f"{metrics['model']} on {metrics['data']}, {metrics['threat']}"
    write_beside(folder / "report.html", page(title, *sections, style=svg.STYLE).encode())


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.2f}{SPACE}%"


def _format_size(count: int) -> str:
    """Return a number of bytes as text in B, kB or MB."""
    for unit, name in ((1_000_000, "MB"), (1000, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def _head(metrics: Mapping[str, Any]) -> str:
    """Return the title, a summary in one sentence, and tiles of the main numbers."""
    size, clean = metrics["file_bytes"], metrics["clean"]
    factor = metrics["dense_file_bytes"] / size
    small = f"{factor:,.1f} times smaller than" if factor >= 1.05 else "about as large as"
    text = (
        f"A model file of {size:,} bytes, {small} dense float32 weights, classifies"
        f" {_percent(clean['accuracy'])} of {clean['n']:,} test images correctly"
    )
    tiles = [(_percent(clean["accuracy"]), "clean accuracy")]
    if metrics["attacks"]:
        name, worst = min(metrics["attacks"].items(), key=lambda item: float(item[1]["accuracy"]))
        several = "the worst of the attacks tried, " if len(metrics["attacks"]) > 1 else ""
        ball = f" within {metrics['threat']}" if "eps" in worst else ""
        text += f"; under {several}{name}{ball}, {_percent(worst['accuracy'])} of {worst['n']:,}"
        tiles.append((_percent(worst["accuracy"]), f"accuracy under {name}"))
    if "certified" in metrics:
        certified, attacked = metrics["certified"], metrics["attacked"]
        text += (
            f"; against every attack within {metrics['threat']}, {_percent(certified['accuracy'])} of"
            f" {certified['n']:,} are proved"
        )
        both = f"[{certified['accuracy'] * 100:.1f}, {attacked['accuracy'] * 100:.1f}]{SPACE}%"
        tiles.append((both, "[certified, attacked] accuracy"))
    tiles += [(_format_size(size), "model file"), (f"{factor:,.1f}×", "smaller than dense float32")]
    boxes = [element("div", element("b", escape(v)), element("span", escape(k)), class_="tile") for v, k in tiles]
    return element(
        "header",
        element("h1", escape(f"{metrics['model']} on {metrics['data']}")),
        element("p", escape(f"{metrics['method']} · {metrics['threat']} · seed {metrics['seed']}"), class_="soft"),
        element("p", escape(f"{text}."), class_="lead"),
        element("div", *boxes, class_="tiles"),
    )


def _accuracies(metrics: Mapping[str, Any]) -> str:
    """Return the table of accuracies with their intervals, and the settings of the attacks."""
    rows, attacks = [], []
    proved = [(name, metrics[name]) for name in ("attacked", "certified") if name in metrics]
    for name, result in (("clean", metrics["clean"]), *metrics["attacks"].items(), *proved):
        low, high = result["ci95"]
        settings = {key: value for key, value in result.items() if key not in ("accuracy", "n", "ci95")}
        bounds = f"{low * 100:.2f} to {_percent(high)}"
        drawn = svg.interval(result["accuracy"], low, high)
        rows.append([escape(name), _percent(result["accuracy"]), bounds, drawn, f"{result['n']:,}"])
        if settings:
            attacks.append(element("li", element("b", escape(name)), escape(f": {_format_settings(settings)}")))
    header = ("images", "accuracy", "95 % interval", "0 to 100 %", "n")
    note = f"On the test split, by the model decoded from {metrics['evaluated_on']}. Intervals are Wilson's."
    if proved:
        note += (
            " Under every attack, the accuracy lies between the certified one, which is proved, and the attacked one,"
            " that of the images that were not broken while the proofs were made."
        )
    listed = element("ul", *attacks, class_="soft") if attacks else ""
    whole = table(header, rows, ("name", "num", "num", "drawn", "num"))
    return whole + element("p", escape(note), class_="soft") + listed


def _format_settings(settings: Mapping[str, Any]) -> str:
    """Return settings as text, such as 'eps 0.2, steps 16, random start no'."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"({_format_settings(value)})"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.5g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{key.replace('_', ' ')} {text(value)}" for key, value in settings.items())


def _checks(metrics: Mapping[str, Any]) -> str:
    """Return the outcomes of the evaluation's checks, and a warning if one failed; "" if none were run."""
    words = {True: "passed", False: "failed", None: "not run"}
    checks = metrics.get("checks", ())
    rows = [[escape(check["name"]), words[check["ok"]], escape(str(check.get("detail", "")))] for check in checks]
    failed = [str(check["name"]) for check in checks if check["ok"] is False]
    text = f"WARNING: do not trust the accuracies under attack. Failed checks of the evaluation: {', '.join(failed)}."
    warning = element("p", element("b", escape(text), class_="bad")) if failed else ""
    return warning + table(("check", "outcome", "detail"), rows, ("name", "", "text")) if rows else ""


def _sizes(metrics: Mapping[str, Any]) -> str:
    """Return two tables: the model's sizes, and how it was trained."""
    size, dense, validation = metrics["file_bytes"], metrics["dense_file_bytes"], metrics["validation"]
    density = metrics["nonzeros"] / metrics["dense_weights"]
    robust = _robust_measure(validation)
    accuracies = f"{_percent(validation['clean']['accuracy'])} clean, "
    accuracies += f"{_percent(validation[robust]['accuracy'])} {ROBUST[robust]}"
    small = {
        "file": f"{size:,} bytes" + (f" of at most {metrics['max_bytes']:,}" if metrics.get("max_bytes") else ""),
        "dense float32 file": f"{dense:,} bytes, {dense / size:,.1f} times the file",
        "nonzeros": f"{metrics['nonzeros']:,} of {metrics['dense_weights']:,} weights ({density * 100:.3g}{SPACE}%)",
        "nominal size": f"{metrics['nominal_bits']:,} bits (values only, as the paper counts)",
        "nominal ratio": f"{metrics['nominal_ratio']:.5f}",
        "codebook": "none, plain values" if metrics["bits"] is None else f"{metrics['bits']:g} bits per value",
    }
    run = {
        "validation": accuracies,
        "values rounded to fp16": _describe_rounding(validation),
        "batch norm re-estimated": "yes, validation better" if validation["batch_norm_reestimated"] else "no",
        "seed": str(metrics["seed"]),
        "time": f"{metrics['seconds']:,.1f} s",
        "versions": ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
    }
    cells = [[[escape(key), escape(value)] for key, value in part.items()] for part in (small, run)]
    return element("div", *(table(("", ""), rows, ("label", "text")) for rows in cells), class_="two")


def _describe_rounding(validation: Mapping[str, Any]) -> str:
    """Return whether values were rounded to float16, and why, in words."""
    if not validation["fp16"]:
        return "no"
    before, robust = validation.get("before_rounding", validation), _robust_measure(validation)
    worse = any(validation[name]["accuracy"] < before[name]["accuracy"] for name in ("clean", robust))
    return "yes, though validation is worse: by chance, or for the budget" if worse else "yes, validation no worse"


def _robust_measure(validation: Mapping[str, Any]) -> str:
    """Return the key of `ROBUST` that a run validated by."""
    return next(key for key in ROBUST if key in validation)


def _training(records: Sequence[Mapping[str, Any]], robust: str) -> str:
    """Return charts of the log's records; robust says what their robust accuracy is, as in `ROBUST`."""
    if not records:
        return element("p", "No epoch was trained: the weights are those that were given.")
    bands = [svg.Band(name, [r["epoch"] for r in group]) for name, group in groupby(records, lambda r: str(r["phase"]))]

    def column(key: str) -> list[float | None]:
        return [record[key] for record in records]

    accuracy = {"clean": column("clean"), robust: column("robust")}
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
    counts = [f"{n:,} {word}" for key, word in zip(images, ("clean", robust), strict=True) for n in images[key]]
    shown = f"Validation images: {', '.join(counts)}. " if counts else ""
    text = (
        f"{trained:,} epochs, {seconds:,.1f} s. {shown}Accuracies are of the model that satisfies the phase's"
        " constraints; each phase starts from the best epoch of the one before."
    )
    return element("p", escape(text), class_="soft") + element("div", *charts, class_="two")


def _examples(examples: Sequence[pictures.Example], threat: Threat, class_names: Sequence[str]) -> str:
    """Return one card per example, and a text that explains them."""
    if not examples:
        return element("p", f"None: none of the first {pictures.SEARCHED} test images is classified correctly.")
    gray = len(examples[0].clean) < 3
    if gray:
        down, zero, up = ("rgb(" + " ".join(f"{v * 255:.0f}" for v in c) + ")" for c in pictures.PALETTE)
        swatches = [
            element("span", class_="swatch", style=f"background:{color}") + f" {word}"
            for color, word in ((down, "darker"), (zero, "unchanged"), (up, "lighter"))
        ]
        colors = ", ".join(swatches)
    else:
        colors = "gray if unchanged, each channel brighter if raised and darker if lowered"
    fooled = sum(example.fooled for example in examples)
    text = (
        f"{len(examples)} test images that the model classifies correctly before the attack, {fooled} of which fool it"
        f" after (chosen to show both; the accuracies are above). The attack is pgd within {threat} as in the"
        " evaluation. The change is enlarged; the value below it is drawn at full strength: "
    )
    cards = [_card(example, threat, class_names) for example in examples]
    return element("p", escape(text), colors, ".", class_="soft") + element("div", *cards, class_="two")


def _card(example: pictures.Example, threat: Threat, class_names: Sequence[str]) -> str:
    """Return the three pictures of one example with their captions."""

    def name(label: int) -> str:
        return class_names[label] if 0 <= label < len(class_names) else str(label) if label >= 0 else "no class"

    def answer(outputs: Any) -> str:
        label = pictures.predicted_class(outputs)
        confidence = f", {float(outputs[label]) * 100:.0f}{SPACE}%" if label >= 0 else ""
        kind = "good" if label == example.label else "bad"
        return element("b", escape(f"{cut(name(label), NAME)}{confidence}"), class_=kind, title=name(label))

    scale = pictures.change_scale(example, threat)
    shown = [
        (example.clean, "clean", answer(example.before)),
        (pictures.change_picture(example, scale), "change", f"±{scale:.3g}"),
        (example.adv, "attacked", answer(example.after)),
    ]
    images = [f'<img src="{pictures.data_uri(image)}" alt="{word} image">' for image, word, _ in shown]
    captions = [element("div", word, class_="soft") + text for _, word, text in shown]
    cells = [element("div", *pair) for pair in zip(images, captions, strict=True)]
    outcome = element("span", "fooled", class_="bad") if example.fooled else element("span", "holds", class_="good")
    title = element("h3", element("span", escape(f"{name(example.label)} (test image {example.index})")), outcome)
    return element("div", title, element("div", *cells, class_="three"), class_="card")


def _again(config_toml: str) -> str:
    """Return the command that repeats the run, and its configuration."""
    command = "atmc compress --config config.toml --out another-folder"
    text = "The folder's config.toml is complete: it gives the same result again on the same kind of machine."
    whole = element("details", element("summary", "config.toml"), element("pre", escape(config_toml)))
    return element("p", text) + element("pre", command) + whole
