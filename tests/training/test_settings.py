"""A setting is declared once, in `Recipe`: Python, [training] in TOML and docs/method.md follow it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import atmc
from atmc.commands.config import Training, parse
from atmc.data import Images
from atmc.robust.objectives import OBJECTIVES
from atmc.training.settings import DEFAULT_EPOCHS, LEARNING_RATES, SETTINGS, default_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
IN_TOML = [name for name, setting in SETTINGS.items() if setting.metadata["section"] == "training"]
MODEL = nn.Linear(2, 2)
RUN = {"model": "lenet", "data": "digits", "threat": "l2:0.5", "ratio": 0.1}


def refusal(**settings) -> str:
    """Return the sentence with which Python refuses a setting; "" if it is accepted."""
    try:
        default_recipe(MODEL, **settings)
    except ValueError as error:
        return str(error)
    return ""


def toml_refusal(**settings) -> str:
    """Return the sentence with which a configuration refuses a setting; "" if it is accepted."""
    try:
        parse({**RUN, "training": settings})
    except ValueError as error:
        return str(error)
    return ""


def test_every_training_setting_is_a_key_of_the_configuration():
    assert list(Training.model_fields) == IN_TOML
    assert [Training.model_fields[name].description for name in IN_TOML] == [
        SETTINGS[name].metadata["help"] for name in IN_TOML
    ]


@pytest.mark.parametrize("name", [name for name in IN_TOML if SETTINGS[name].metadata["bounds"]])
def test_bounds_are_the_same_in_python_and_in_toml(name):
    bounds, kind = SETTINGS[name].metadata["bounds"], int if "int" in SETTINGS[name].type else float
    ends = [(bounds.low, bounds.open_low, -1), (bounds.high, bounds.open_high, 1)]
    for end, is_open, outwards in ends:
        if abs(end) == float("inf"):
            continue
        for value, allowed in ((kind(end), not is_open), (kind(end + outwards), False)):
            refused = refusal(**{name: value})
            assert (refused == "") == allowed
            assert refused in toml_refusal(**{name: value})
            assert (toml_refusal(**{name: value}) == "") == allowed


@pytest.mark.parametrize("name", [name for name in IN_TOML if SETTINGS[name].metadata["choices"]])
def test_choices_are_the_same_in_python_and_in_toml(name):
    for value in SETTINGS[name].metadata["choices"]:
        assert refusal(**{name: value}) == toml_refusal(**{name: value}) == ""
    assert refusal(**{name: "x"}) in toml_refusal(**{name: "x"})
    assert refusal(**{name: "x"}).startswith(f"unknown {name} 'x': expected one of ")


@pytest.mark.parametrize("settings", [{"epochs": {"dens": 1}}, {"epochs": -1}, {"learning_rate": {"tune": -0.5}}])
def test_phases_are_the_same_in_python_and_in_toml(settings):
    assert refusal(**settings)
    assert refusal(**settings) in toml_refusal(**settings)


OPTIONS = [(name, key, option) for name, spec in OBJECTIVES.items() for key, option in spec.options.items()]


@pytest.mark.parametrize(("objective", "key", "option"), OPTIONS)
def test_objective_options_are_the_same_in_python_and_in_toml(objective, key, option):
    assert default_recipe(MODEL, objective=objective).objective_options[key] == option.default
    given = {"objective": objective, "objective_options": {key: option.default / 2}}
    recipe = default_recipe(MODEL, **given)
    config = parse({**RUN, "training": given})
    assert recipe.objective_options[key] == config.recipe(MODEL).objective_options[key] == option.default / 2
    assert config.completed(recipe).training.objective_options == recipe.objective_options
    for options in ({key: option.bounds.low - 1}, {"gamma": 1.0}):
        wrong = {"objective": objective, "objective_options": options}
        assert refusal(**wrong)
        assert refusal(**wrong) in toml_refusal(**wrong)


def test_an_objective_option_reaches_the_loss():
    """With beta 0 the loss of TRADES is the clean cross-entropy, which is what `natural` trains on."""
    images = Images(torch.rand(8, 1, 6, 6), torch.arange(8) % 4)
    losses = {}
    for name, settings in {
        "natural": {"objective": "natural"},
        "beta 0": {"objective": "trades", "objective_options": {"beta": 0}},
        "beta 6": {"objective": "trades"},
    }.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        epochs = {"dense": 1, "l0": 0, "admm": 0, "tune": 0}
        budget = atmc.Budget(ratio=1.0)
        result = atmc.compress(model, images, images, threat="linf:0.2", budget=budget, epochs=epochs, **settings)
        losses[name] = result.records[0].loss
    assert losses["beta 0"] == pytest.approx(losses["natural"], rel=1e-6)
    assert losses["beta 6"] > losses["natural"]


def in_words(name: str) -> str:
    """Return the default of a setting as docs/method.md states it: in TOML, or in words if it depends on something."""
    if name == "epochs":
        return ", ".join(f"{phase} {count}" for phase, count in DEFAULT_EPOCHS.items())
    if name == "learning_rate":
        rates = [", ".join(f"{phase} {rate:g}" for phase, rate in rates.items()) for rates in LEARNING_RATES.values()]
        return "; ".join(f"{optimizer}: {listed}" for optimizer, listed in zip(LEARNING_RATES, rates, strict=True))
    if name == "objective":
        return "by threat and model"
    if name == "objective_options":
        return "of the objective"
    default, with_batch_norm = SETTINGS[name].default, SETTINGS[name].metadata["with_batch_norm"]
    text = "all" if default is None else f"`{json.dumps(default)}`"
    return text if with_batch_norm is None else f"{text}; `{json.dumps(with_batch_norm)}` with batch norm"


def settings_table() -> str:
    """Return the table of settings as docs/method.md must show it."""
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        bounds, choices = setting.metadata["bounds"], setting.metadata["choices"]
        values = str(bounds) if bounds else ", ".join(f"`{choice}`" for choice in choices or ())
        key = f"`{name}`" if name in IN_TOML else f"`{name}` (Python)"
        lines.append(f"| {key} | {in_words(name)} | {values} | {setting.metadata['help']} |")
    return "\n".join(lines)


def objectives_table() -> str:
    """Return the table of objectives as docs/method.md must show it."""
    lines = ["| objective | loss | options | threats |", "|---|---|---|---|"]
    for name, spec in OBJECTIVES.items():
        options = "; ".join(
            f"`{key}` {option.default:g}, {option.bounds}: {option.help}" for key, option in spec.options.items()
        )
        threats = "all" if spec.norms is None else ", ".join(spec.norms)
        lines.append(f"| `{name}` | {spec.help} | {options} | {threats} |")
    return "\n".join(lines)


@pytest.mark.parametrize("table", [settings_table, objectives_table])
def test_the_page_on_the_method_states_what_the_code_does(table):
    assert table() in PAGE, f"docs/method.md must hold this table:\n{table()}"
