"""Run folders are complete, can be resumed after a kill at any moment, and are never overwritten by accident."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from atmc import models
from atmc.api import evaluate, verify
from atmc.commands import run as runs
from atmc.commands.checkpoints import STATE_VERSION, load_weights
from atmc.commands.config import parse, read_toml
from atmc.commands.outputs import FolderInUse
from atmc.commands.run import Finished, run
from atmc.compress.factorize import compressible_parameters, factor_structure
from atmc.pack import artifact
from atmc.robust.threats import parse_threat
from atmc.training import settings
from atmc.training.runner import EpochDone

SMALL = {
    "model": "small_model:build",
    "data": "digits",
    "threat": "linf:0.1",
    "ratio": 0.3,
    "bits": 3,
    "precision": "fp32",
    "threads": 1,
    "eval_n": 50,
    "checks": False,
    "limit": 300,
    "training": {"objective": "mixed", "epochs": 1, "attack_steps": 1, "val_n": 20, "batch_size": 100},
}
SOURCE = """
from torch import nn

def build(num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_model.py").write_text(SOURCE)
    yield tmp_path
    sys.modules.pop("small_model", None)


def finish(folder: Path, **options) -> dict:
    changes = options.pop("changes", {})
    events = list(run(parse({**SMALL, **changes}), folder, **options))
    assert isinstance(events[-1], Finished)
    return events[-1].metrics


def interrupt(folder: Path, epochs: int) -> None:
    ends = 0
    for event in run(parse(SMALL), folder):
        if isinstance(event, EpochDone):
            ends += 1
            if ends == epochs:
                return


def test_a_run_folder_is_complete_and_consistent(here):
    metrics = finish(here / "out")
    assert {path.name for path in (here / "out").iterdir()} == {
        "config.toml",
        "log.jsonl",
        "model.atmc",
        "metrics.json",
        "report.html",
    }
    assert json.loads((here / "out" / "metrics.json").read_text()) == metrics
    assert metrics["file_bytes"] == (here / "out" / "model.atmc").stat().st_size
    log = [json.loads(line) for line in (here / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in log] == ["dense", "l0", "admm", "tune", "tune"]
    assert metrics["nonzeros"] <= int(0.3 * metrics["dense_weights"])
    assert metrics["clean"]["n"] == 360
    assert metrics["attacks"]["pgd"]["n"] == 50
    assert metrics["attacks"]["pgd"]["steps"] == 16
    assert metrics["attacks"]["pgd"]["random_start"] is False
    import small_model

    loaded = artifact.load(here / "out" / "model.atmc", factory=small_model.build)
    digits = runs.load_data("digits").test
    report = evaluate(loaded, digits, threat=parse_threat("linf:0.1"), n=50, checks=False)
    assert report.to_json()["clean"] == metrics["clean"]
    assert report.to_json()["attacks"] == metrics["attacks"]


def test_the_written_config_runs_to_the_same_file(here):
    finish(here / "one")
    written = parse(read_toml(here / "one" / "config.toml"))
    list(run(written, here / "two"))
    assert (here / "one" / "model.atmc").read_bytes() == (here / "two" / "model.atmc").read_bytes()
    assert (here / "one" / "config.toml").read_bytes() == (here / "two" / "config.toml").read_bytes()


@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_an_interrupted_run_is_resumed_to_the_same_file(here, epochs):
    finish(here / "whole")
    interrupt(here / "cut", epochs)
    with open(here / "cut" / "log.jsonl", "a") as log:
        log.write('{"phase": "l0"}\n')  # written, but killed before its checkpoint
    finish(here / "cut", resume=True)
    assert (here / "cut" / "model.atmc").read_bytes() == (here / "whole" / "model.atmc").read_bytes()
    lines = [(here / name / "log.jsonl").read_text().splitlines() for name in ("cut", "whole")]
    without_time = [[{**json.loads(line), "seconds": 0} for line in text] for text in lines]
    assert without_time[0] == without_time[1]


def test_killed_by_the_system_and_resumed(here):
    """The process of the command is killed in the middle of training."""
    (here / "run.toml").write_text(parse({**SMALL, "training": {**SMALL["training"], "epochs": 4}}).to_toml())
    command = [sys.executable, "-m", "atmc", "compress", "--config", "run.toml", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "whole"], check=True, env=environment, capture_output=True, timeout=120)
    victim = subprocess.Popen([*command, "cut"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (here / "cut" / "checkpoint" / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (here / "cut" / "model.atmc").exists()
    done = subprocess.run(
        [sys.executable, "-m", "atmc", "compress", "--out", "cut", "--resume"],
        env=environment,
        capture_output=True,
        timeout=120,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (here / "cut" / "model.atmc").read_bytes() == (here / "whole" / "model.atmc").read_bytes()


def test_killed_in_the_final_evaluation_and_resumed(here):
    """The process is killed after the model file is written and before the metrics are."""
    killed = "import os, signal; from atmc.cli.main import main; from atmc.evaluation import evaluate; "
    killed += "evaluate.run_protocol = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL); main()"
    (here / "run.toml").write_text(parse(SMALL).to_toml())
    options = ["compress", "--config", "run.toml", "--out", "cut"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = subprocess.run([sys.executable, "-c", killed, *options], env=environment, capture_output=True, timeout=120)
    assert victim.returncode == -signal.SIGKILL, victim.stderr
    written = (here / "cut" / "model.atmc").read_bytes()
    assert not (here / "cut" / "metrics.json").exists()
    (here / "cut" / ".model.atmc.7.tmp").write_bytes(b"half")  # as a kill while a file is written would leave
    metrics, whole = finish(here / "cut", resume=True), finish(here / "whole")
    assert (here / "cut" / "model.atmc").read_bytes() == written == (here / "whole" / "model.atmc").read_bytes()
    assert {**metrics, "seconds": 0} == {**whole, "seconds": 0}
    assert {path.name for path in (here / "cut").iterdir()} == {path.name for path in (here / "whole").iterdir()}


def test_killed_just_after_the_metrics(here):
    metrics = finish(here / "out")
    (here / "out" / "checkpoint").mkdir()
    assert finish(here / "out", resume=True) == metrics
    assert not (here / "out" / "checkpoint").exists()


def test_a_report_that_cannot_be_made_loses_nothing(here, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_report", fail)
        with pytest.raises(OSError, match="No space left"):
            finish(here / "out")
    metrics = json.loads((here / "out" / "metrics.json").read_text())
    assert finish(here / "out", resume=True) == metrics
    assert (here / "out" / "report.html").exists()
    assert not (here / "out" / "checkpoint").exists()


def test_nothing_is_overwritten_unless_asked(here):
    metrics = finish(here / "out")
    before = (here / "out" / "model.atmc").read_bytes()
    with pytest.raises(ValueError, match="add --resume to continue it or --overwrite"):
        finish(here / "out")
    assert finish(here / "out", resume=True) == metrics  # finished: shown again
    with pytest.raises(ValueError, match="started with other settings: seed was 0, is 5"):
        finish(here / "out", resume=True, changes={"seed": 5})
    assert (here / "out" / "model.atmc").read_bytes() == before
    finish(here / "out", overwrite=True, changes={"seed": 5})
    assert (here / "out" / "model.atmc").read_bytes() != before


def test_a_quick_trial_validates_on_fewer_images_and_says_so(here):
    changes = {
        "training": {**SMALL["training"], "val_clean_n": 30, "epochs": {"dense": 1, "l0": 0, "admm": 0, "tune": 0}}
    }
    stages = [event.text for event in run(parse({**SMALL, **changes}), here / "out") if isinstance(event, runs.Message)]
    assert "training on 300 images, validating on 30 of 143, under attack on 20" in stages
    log = [json.loads(line) for line in (here / "out" / "log.jsonl").read_text().splitlines()]
    assert {(line["clean_n"], line["robust_n"]) for line in log} == {(30, 20)}
    validation = json.loads((here / "out" / "metrics.json").read_text())["validation"]
    assert (validation["clean"]["n"], validation["quick"]["n"]) == (30, 20)
    assert "Validation images: 30 clean, 20 under the attack quick." in (here / "out" / "report.html").read_text()
    with pytest.raises(ValueError, match=r"training\.val_clean_n was 30, is None"):
        finish(here / "out", resume=True, changes={"training": {**changes["training"], "val_clean_n": None}})


def test_settings_that_a_run_lacks_have_their_defaults(here):
    finish(here / "out")
    config = here / "out" / "config.toml"
    kept = [line for line in config.read_text().splitlines() if not line.startswith(("regrow", "exclude"))]
    config.write_text("\n".join(kept))
    finish(here / "out", resume=True)
    for setting, message in (
        ({"val_clean_n": 9}, "val_clean_n was None, is 9"),
        ({"regrow": 2.0}, "regrow was 1.0, is 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            finish(here / "out", resume=True, changes={"training": {**SMALL["training"], **setting}})


def test_objective_options_go_through_a_run_folder(here):
    trades = {**SMALL["training"], "objective": "trades", "epochs": {"dense": 1, "l0": 0, "admm": 0, "tune": 0}}
    given = {**trades, "objective_options": {"beta": 3.0}}
    assert finish(here / "out", changes={"training": given})["objective"] == "trades"
    assert read_toml(here / "out" / "config.toml")["training"]["objective_options"] == {"beta": 3.0}
    finish(here / "out", resume=True, changes={"training": given})
    message = r"training\.objective_options was \{'beta': 3\.0\}, is \{'beta': 6\.0\}"
    with pytest.raises(ValueError, match=message):
        finish(here / "out", resume=True, changes={"training": trades})


def test_a_configuration_older_than_objective_options_resumes_with_their_defaults(here):
    trades = {**SMALL["training"], "objective": "trades", "epochs": {"dense": 1, "l0": 0, "admm": 0, "tune": 0}}
    metrics = finish(here / "out", changes={"training": trades})
    config = here / "out" / "config.toml"
    text = config.read_text()
    section = "[training.objective_options]\nbeta = 6.0\n"
    assert section in text
    config.write_text(text.replace(section, ""))
    assert finish(here / "out", resume=True, changes={"training": trades}) == metrics


def test_metrics_name_the_objective_that_trained(here):
    changes = {"method": "nap", "bits": None, "training": {**SMALL["training"], "epochs": 0}}
    metrics = finish(here / "out", changes=changes)
    assert list(metrics)[:2] == ["method", "objective"]
    assert metrics["objective"] == "natural"


def unnamed(**changes) -> dict:
    """Return changes of `SMALL` that leave the objective to the default."""
    return {"training": {key: value for key, value in SMALL["training"].items() if key != "objective"}, **changes}


def messages(folder: Path, **changes) -> str:
    """Run `SMALL` with changes; return what it says it does, in lines."""
    events = run(parse({**SMALL, **changes}), folder)
    return "\n".join(event.text for event in events if isinstance(event, runs.Message))


def test_the_default_objective_is_named_recorded_and_proved(here, monkeypatch):
    """The figures of the proofs are those of `verify` by intervals on the file that was written."""
    monkeypatch.setattr(settings, "FEWEST_STEPS", 1)
    text = messages(here / "out", **unnamed())
    assert "objective: ibp, the default for linf:0.1, because at an eps of 0.1 or more, proofs exceed what" in text
    assert read_toml(here / "out" / "config.toml")["training"]["objective"] == "ibp"
    metrics = json.loads((here / "out" / "metrics.json").read_text())
    import small_model

    loaded = artifact.open(here / "out" / "model.atmc", factory=small_model.build)
    test = runs.load_data("digits").test
    figures = verify(loaded.model, test, threat="linf:0.1", n=50, linear=False, factors=loaded.factors).to_json()
    assert {name: metrics[name] for name in ("certified", "attacked")} == {
        name: figures[name] for name in ("certified", "attacked")
    }
    assert metrics["certified"]["n"] == 50
    assert metrics["certified"]["accuracy"] <= metrics["attacked"]["accuracy"]
    assert finish(here / "out", resume=True, changes=unnamed()) == metrics


def test_a_run_keeps_the_objective_that_it_was_started_with(here, monkeypatch):
    """The default of an older version may have been another one; `SMALL` names it."""
    monkeypatch.setattr(settings, "FEWEST_STEPS", 1)
    interrupt(here / "out", 2)
    metrics = finish(here / "out", resume=True, changes=unnamed())
    assert metrics["objective"] == "mixed"
    assert "certified" not in metrics
    assert "objective:" not in messages(here / "named")


def test_proofs_by_option(here):
    """Proofs are there if asked for, and not there if refused, whatever the objective."""
    none = {"epochs": {"dense": 0, "l0": 0, "admm": 0, "tune": 0}}
    metrics = finish(here / "with", changes={"verify": True, "eval_n": 5, "training": SMALL["training"] | none})
    assert metrics["objective"] == "mixed"
    assert metrics["certified"]["n"] == 5
    page = (here / "with" / "report.html").read_text()
    assert "[certified, attacked] accuracy" in page
    without = {"objective": "ibp", "eps_ramp": 0.0, **none}
    metrics = finish(here / "without", changes={"verify": False, "training": SMALL["training"] | without})
    assert "certified" not in metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threat": "l2:0.5"}, "linf"),
        ({"model": "small_model:build_smooth"}, "Tanh|tanh"),
    ],
)
def test_proofs_that_cannot_be_given_are_refused_before_training(here, changes, message):
    """By default such a run has none, and says why."""
    (here / "small_model.py").write_text(SOURCE + SOURCE.replace("build(", "build_smooth(").replace("ReLU", "Tanh"))
    with pytest.raises(ValueError, match=message):
        finish(here / "out", changes={**changes, "verify": True})
    assert not (here / "out").exists()
    certified = {**SMALL["training"], "objective": "ibp", "epochs": 0}
    text = messages(here / "out", **changes, training=certified)
    assert re.search(rf"no proofs of the test images: .*({message})", text)
    assert "certified" not in json.loads((here / "out" / "metrics.json").read_text())


def test_a_number_of_images_for_each_attack(here):
    changes = {
        "eval_n": {"pgd-strong": 7},
        "attacks": ["pgd", "pgd-strong"],
        "training": {**SMALL["training"], "epochs": 0},
    }
    attacks = finish(here / "out", changes=changes)["attacks"]
    assert (attacks["pgd"]["n"], attacks["pgd-strong"]["n"]) == (360, 7)


def test_folders_that_cannot_be_used(here):
    (here / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        finish(here / "file")
    (here / "other").mkdir()
    (here / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds no run of atmc"):
        finish(here / "other")
    assert (here / "other" / "thesis.tex").read_text() == "x"


def test_a_folder_in_use(here):
    one = run(parse(SMALL), here / "out")
    for event in one:
        if isinstance(event, EpochDone):
            break
    with pytest.raises(FolderInUse, match="in use by another run"):
        finish(here / "out", resume=True)
    one.close()
    finish(here / "out", resume=True)


def test_a_full_disk_loses_nothing(here, monkeypatch):
    interrupt(here / "out", 2)
    checkpoint = (here / "out" / "checkpoint" / "state.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(artifact.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            finish(here / "out", resume=True)
    assert (here / "out" / "checkpoint" / "state.pt").read_bytes() == checkpoint
    finish(here / "out", resume=True)


def test_images_per_step_that_are_not_named_follow_the_data_and_a_resumed_run(here):
    training = {name: value for name, value in SMALL["training"].items() if name != "batch_size"}
    finish(here / "new", changes={"training": training})
    assert read_toml(here / "new" / "config.toml")["training"]["batch_size"] == 32  # of 300 images
    interrupt(here / "out", 2)
    finish(here / "out", resume=True, changes={"training": training})
    assert read_toml(here / "out" / "config.toml")["training"]["batch_size"] == SMALL["training"]["batch_size"]


@pytest.mark.parametrize(("version", "age"), [(None, "an older"), (STATE_VERSION + 1, "a newer")])
def test_a_run_that_other_code_began(here, version, age):
    interrupt(here / "out", 2)
    path = here / "out" / "checkpoint" / "state.pt"
    saved, log = torch.load(path, weights_only=True), (here / "out" / "log.jsonl").read_bytes()
    del saved["version"]
    torch.save(saved if version is None else {**saved, "version": version}, path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"was begun by {age} version of atmc: finish it with that one, or start"):
        finish(here / "out", resume=True)
    assert path.read_bytes() == content
    assert (here / "out" / "log.jsonl").read_bytes() == log


def test_another_content_of_the_state_is_another_version(here):
    """If this fails, `STATE_VERSION` has to rise together with the names below."""
    interrupt(here / "out", 2)
    state = torch.load(here / "out" / "checkpoint" / "state.pt", weights_only=True)["state"]
    names = "phase epoch structure model optimizer admm moments allocation start best best_score"
    assert (STATE_VERSION, list(state)) == (2, names.split())
    assert list(state["moments"]) == ["sums", "steps", "silent"]


def test_cuda_asked_for_and_absent(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device here"):
        finish(here / "out", changes={"device": "cuda"})
    assert not (here / "out").exists()


class TestConfig:
    def test_every_problem_at_once_with_the_nearest_key(self):
        values = {**SMALL, "thread": 2, "seed": -1, "training": {"epoch": 3, "gradual": 2.0}}
        with pytest.raises(ValueError, match=r"run\.toml") as caught:
            parse(values, "run.toml")
        text = str(caught.value)
        assert "unknown key 'thread'; did you mean 'thread" in text
        assert "unknown key 'training.epoch'; did you mean 'epochs'?" in text
        assert "seed:" in text
        assert "training.gradual:" in text

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"threat": "linf:2/0"}, "expected a radius"),
            ({"attacks": ["pdg"]}, "did you mean 'pgd'"),
            ({"ratio": None}, "exactly one of ratio, nonzeros and max_bytes"),
            ({"ratio": 2.0}, "a ratio > 0 and <= 1"),
            ({"bits": 12}, "bits >= 1 and <= 8"),
            ({"model": None}, "model"),
            ({"eval_n": 0}, "eval_n >= 1, got 0"),
            ({"attacks": []}, "expected at least one attack"),
            ({"seed": 2**63}, "seed"),
            ({"eval_n": {"pdg": 5}}, "did you mean 'pgd'"),
            ({"method": "da"}, "leave out ratio, nonzeros, max_bytes and bits"),
            ({"method": "atcm"}, "did you mean 'atmc'"),
        ],
    )
    def test_wrong_values(self, change, message):
        with pytest.raises(ValueError, match=message):
            parse({**SMALL, **change})

    def test_missing_key_and_files(self, tmp_path):
        with pytest.raises(ValueError, match="threat is missing"):
            parse({"model": "lenet", "data": "digits", "ratio": 0.1})
        with pytest.raises(ValueError, match="cannot read"):
            read_toml(tmp_path / "no.toml")
        (tmp_path / "bad.toml").write_text("a = ")
        with pytest.raises(ValueError, match="is not a TOML file"):
            read_toml(tmp_path / "bad.toml")

    def test_round_trip(self):
        config = parse(SMALL)
        assert parse(tomllib.loads(config.to_toml())) == config


def stored_weights(path: Path) -> dict:
    """Return the weights of a file as they are stored."""
    return {name: weight for name, (weight, _) in artifact.decode(artifact.read(path)).weights.items()}


class TestWeights:
    def test_every_kind_of_file(self, tmp_path, lenet):
        state = models.build("lenet", 10, seed=5).state_dict()
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "a.pt")
        save_file(state, tmp_path / "a.safetensors")
        other = models.build("lenet", 10, seed=5)
        artifact.save(other, tmp_path / "a.atmc")
        for name in ("a.pt", "a.safetensors", "a.atmc"):
            model = models.build("lenet", 10, seed=0)
            load_weights(model, str(tmp_path / name))
            assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def test_normalization_stays_the_models_own(self, tmp_path):
        torch.save(models.build("lenet", 10, seed=5).state_dict(), tmp_path / "a.pt")
        model = models.build("lenet", 10, mean=[0.3], std=[0.4])
        load_weights(model, str(tmp_path / "a.pt"))
        assert model.normalize.mean.item() == pytest.approx(0.3)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("no.pt", None, "does not exist"),
            ("a.pt", b"rubbish", "damaged or no file of torch.save"),
            ("a.safetensors", b"rubbish", "damaged or not a safetensors file"),
            ("a.atmc", b"rubbish", "not an atmc model file"),
            ("b.pt", [1, 2], "holds no state dict"),
            ("c.pt", nn.Linear(2, 2), "holds more than weights, and loading it would run code"),
            (
                "d.pt",
                {"fc9.weight": torch.zeros(3)},
                "8 of the model's 8 tensors are not there: conv1.*; 1 of the file's are not",
            ),
        ],
    )
    def test_refused(self, tmp_path, lenet, name, content, message):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_weights(lenet, str(path))

    def test_shapes_that_differ(self, tmp_path, lenet):
        torch.save(models.build("lenet", 7).state_dict(), tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"fc2\.weight has shape \(7, 500\), not \(10, 500\)"):
            load_weights(lenet, str(tmp_path / "a.pt"))

    def test_a_model_file_of_another_class(self, tmp_path):
        """The error names the tensor that differs, and no factory, since the user gave none."""
        artifact.save(nn.Sequential(nn.Linear(4, 3)), tmp_path / "a.atmc")
        message = r"a\.atmc is of another model: .*tensor 0\.weight has shape \(3, 4\), the model's is \(3, 5\)$"
        with pytest.raises(ValueError, match=message):
            load_weights(nn.Sequential(nn.Linear(5, 3)), str(tmp_path / "a.atmc"))

    def test_factors_of_a_checkpoint_are_kept(self, here):
        finish(here / "out")
        metrics = finish(
            here / "more",
            changes={
                "checkpoint": str(here / "out" / "model.atmc"),
                "training": {"epochs": {"dense": 0, "l0": 0, "admm": 1}, "val_n": 20},
            },
        )
        stored = stored_weights(here / "out" / "model.atmc")
        model = nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
        load_weights(model, str(here / "out" / "model.atmc"), factorized=True)
        factored = {path: form for path, (form, _) in factor_structure(model).items()}
        assert factored == {path: weight.form for path, weight in stored.items() if weight.form != "plain"}
        expected = {f"{path}.{name}": x for path, weight in stored.items() for name, x in weight.parts.items()}
        for name, tensor in compressible_parameters(model).items():
            assert np.array_equal(tensor.detach().numpy(), expected[name if name in expected else f"{name}.W"])
        assert metrics["nonzeros"] <= int(0.3 * metrics["dense_weights"])


CONFIGS = sorted(Path(__file__).parents[2].glob("configs/**/*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configurations_are_valid(path):
    config = parse(read_toml(path), str(path))
    assert config.recipe(models.build(config.model, 10)).epochs
