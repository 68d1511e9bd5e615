"""`atmc evaluate`: what it prints, writes, refuses, and that it goes on after a kill to the same figures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from commands import call
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import atmc
from atmc.commands import partial_results
from atmc.evaluation import adversarial_file, curves, evaluate, resume, smoothing
from atmc.evaluation.accuracy import Verdicts

MODELS = """
import torch
from torch import nn

def build(num_classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))

class Probabilities(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = build(num_classes)

    def forward(self, x):
        return (100 * self.net(x)).softmax(1)
"""


def trained() -> nn.Module:
    """A linear model of the digits, by a few steps of least squares on one-hot labels."""
    train = atmc.load_data("digits").train
    x, y = train.float_pixels(slice(None)).flatten(1), nn.functional.one_hot(train.labels, 10).float()
    x = torch.cat((x, torch.ones(len(x), 1)), 1)
    weight = torch.linalg.solve(x.T @ x + 5 * torch.eye(785), x.T @ (10 * y - 5))
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with torch.no_grad():
        model[1].weight.copy_(weight[:-1].T)
        model[1].bias.copy_(weight[-1])
    return model


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A folder with two models of the digits, a.atmc and the weaker b.atmc, and their classes to import."""
    folder = tmp_path_factory.mktemp("assess")
    (folder / "assess_models.py").write_text(MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        import assess_models

        model = assess_models.build(10)
        model.load_state_dict(trained().state_dict())
        atmc.save(model, "a.atmc", input_shape=(1, 28, 28))
        with torch.no_grad():
            model[1].weight[3].zero_()
        atmc.save(model, "b.atmc", input_shape=(1, 28, 28))
        atmc.save(model, "small.atmc", input_shape=(1, 14, 56))
        yield folder
    sys.modules.pop("assess_models", None)


def command_of(
    file: object, *options: object, threat: str = "linf:0.05", model: str = "assess_models:build"
) -> list[object]:
    return ["evaluate", file, "--data", "digits", "--threat", threat, "--model", model, *options]


def run_evaluate(file: object, *options: object, threat: str = "linf:0.05", model: str = "assess_models:build") -> int:
    return call(*command_of(file, *options, threat=threat, model=model))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, **options: str) -> str:
    return commands.refused(capsys, *command_of(*arguments, **options))


def figures(path: str) -> dict:
    return json.loads(Path(path).read_text())


class TestDone:
    def test_everything_at_once(self, here, capsys):
        wanted = ["--attack", "pgd,fgsm", "--n", 60, "--json", "all.json", "--against", "b.atmc", "--curves", 20]
        wanted += ["--save-examples", "all.npz", "--gallery", "all.png", "--per-class", "--transfer-from", "b.atmc"]
        assert run_evaluate("a.atmc", *wanted) == 0
        text = capsys.readouterr().out
        found = figures("all.json")
        assert set(found["attacks"]) == {"pgd", "fgsm"}
        assert found["worst_case"]["of"] == ["pgd", "fgsm"]
        assert found["worst_case"]["accuracy"] <= min(attack["accuracy"] for attack in found["attacks"].values())
        assert [check["name"] for check in found["checks"]][-1] == "transfer"
        assert found["checks"][-1]["ok"] is True
        assert found["against"]["comparison"]["clean"]["verdict"] == "A is better"
        assert set(found["against"]["comparison"]) == {"clean", "pgd", "fgsm"}
        eps = [point["accuracy"] for point in found["curves"]["eps"]]
        assert eps == sorted(eps, reverse=True)
        assert found["curves"]["eps"][0]["eps"] == 0
        assert sum(row["n"] for row in found["per_class"]["pgd"]) == 60
        right = sum(round(row["accuracy"] * row["n"]) for row in found["per_class"]["pgd"])
        assert right == round(found["attacks"]["pgd"]["accuracy"] * 60)
        for word in ("does the evaluation hold?", "McNemar", "accuracy against eps", "by class", "passed"):
            assert word in text
        assert "WARNING" not in text
        with Image.open("all.png") as image:
            assert image.format == "PNG"
            assert image.size[0] > 3 * 112
        held = adversarial_file.read("all.npz")
        assert held.adv.shape == (60, 1, 28, 28)
        model = atmc.load("a.atmc", factory=sys.modules["assess_models"].build)
        assert torch.equal(model(held.adv).argmax(1), held.predictions)
        assert float((held.predictions == held.labels).float().mean()) == pytest.approx(
            found["worst_case"]["accuracy"], abs=1e-6
        )

    def test_replay(self, here, capsys):
        """The same model agrees with itself everywhere; another one does not; both say so."""
        options = ["--n", 40, "--no-checks"]
        assert run_evaluate("a.atmc", *options, "--save-examples", "replay.npz") == 0
        assert run_evaluate("a.atmc", *options, "--replay", "replay.npz", "--json", "same.json") == 0
        same = figures("same.json")["replay"]
        assert same["agreement"]["accuracy"] == 1.0
        assert same["accuracy"]["accuracy"] == same["accuracy_of_the_attacked_model"]
        assert run_evaluate("b.atmc", *options, "--replay", "replay.npz", "--json", "other.json") == 0
        assert figures("other.json")["replay"]["agreement"]["accuracy"] < 1
        assert "same prediction as the model attacked" in capsys.readouterr().out

    def test_a_failed_check_cannot_be_overlooked(self, capsys, here):
        atmc.save(sys.modules["assess_models"].Probabilities(10), "soft.atmc", input_shape=(1, 28, 28))
        assert run_evaluate("soft.atmc", "--n", 30, model="assess_models:Probabilities") == 0
        text = capsys.readouterr().out
        assert "FAILED, DO NOT TRUST THESE FIGURES" in text
        assert "NOT TO BE TRUSTED" in text
        assert "logits" in text
        assert run_evaluate("a.atmc", "--n", 30, "--no-checks") == 0
        assert "does the evaluation hold" not in capsys.readouterr().out

    def test_checkpoints(self, here, capsys):
        """Weights in other files; a zoo model by its name."""
        model = atmc.load("a.atmc", factory=sys.modules["assess_models"].build)
        torch.save(model.state_dict(), "a.pt")
        save_file(model.state_dict(), "a.safetensors")
        found = []
        for name in ("a.atmc", "a.pt", "a.safetensors"):
            assert run_evaluate(name, "--n", 20, "--no-checks", "--json", "weights.json", "--overwrite") == 0
            found.append(figures("weights.json")["attacks"])
        assert found[0] == found[1] == found[2]
        assert "--model" in _error(capsys, "evaluate", "a.pt", "--data", "digits", "--threat", "linf:0.1")
        save_file(atmc.models.build("lenet", 10).state_dict(), "lenet.safetensors")
        assert run_evaluate("lenet.safetensors", "--n", 5, "--no-checks", model="lenet") == 0

    def test_time_is_kept(self, here):
        assert (
            run_evaluate("a.atmc", "--attack", "pgd-strong", "--time", 1e-9, "--batch-size", 7, "--json", "time.json")
            == 0
        )
        assert figures("time.json")["attacks"]["pgd-strong"]["n"] == 7

    def test_custom_pgd(self, here):
        options = ["--steps", 3, "--step-size", 0.02, "--restarts", 2, "--loss", "dlr", "--n", 20, "--no-checks"]
        assert run_evaluate("a.atmc", *options, "--json", "custom.json") == 0
        found = figures("custom.json")["attacks"]["pgd"]
        assert (found["steps"], found["step_size"], found["restarts"], found["loss"]) == (3, 0.02, 2, "dlr")

    def test_certify(self, here, capsys):
        options = ["--n", 4, "--no-checks", "--certify", 0.25, "--certify-samples", 1000, "--json", "certify.json"]
        assert run_evaluate("a.atmc", *options, threat="l2:0.25") == 0
        found = figures("certify.json")["smoothing"]
        assert found["failure_probability"] == 0.001
        assert found["n"] == 4
        assert [point["radius"] for point in found["curve"]][:3] == [0, 0.0625, 0.125]
        shares = [point["accuracy"] for point in found["curve"]]
        assert shares == sorted(shares, reverse=True)
        assert "accuracy certified by smoothing" in capsys.readouterr().out


def _error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert call(*arguments) == 2
    return capsys.readouterr().err


class TestResume:
    OPTIONS = ("--attack", "pgd-strong,apgd-ce", "--n", 60, "--batch-size", 10, "--no-checks", "--save-examples")

    def test_killed_and_gone_on(self, here, monkeypatch):
        """SIGKILL in the middle; --resume ends in the figures and images of an undisturbed run."""
        assert run_evaluate("a.atmc", *self.OPTIONS, "whole.npz", "--json", "whole.json") == 0
        code = "from atmc.cli.main import main; from atmc.evaluation import evaluate; evaluate.SAVE_EVERY = 0.0; main()"
        command = [sys.executable, "-c", code, "evaluate", "a.atmc", "--data", "digits", "--threat", "linf:0.05"]
        command += ["--model", "assess_models:build", *map(str, self.OPTIONS), "cut.npz", "--json", "cut.json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}"}
        victim = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (here / "cut.json.state").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        assert not (here / "cut.json").exists()
        begun = resume.read_state(here / "cut.json.state")["pgd-strong"][1]
        assert begun.done or begun.stage > 0
        assert run_evaluate("a.atmc", *self.OPTIONS, "cut.npz", "--json", "cut.json", "--resume") == 0
        one, two = figures("whole.json"), figures("cut.json")
        assert one["attacks"] == two["attacks"]
        assert one["per_class"] == two["per_class"]
        assert torch.equal(adversarial_file.read("whole.npz").adv, adversarial_file.read("cut.npz").adv)
        assert not (here / "cut.json.state").exists()

    @pytest.mark.parametrize(
        ("module", "function", "count"), [(curves, "at_steps", len(curves.STEPS)), (smoothing, "certify_radius", 12)]
    )
    def test_curves_and_certificate_go_on(self, here, monkeypatch, capsys, module, function, count):
        """Interrupted in the middle of either: nothing that was measured before is measured again."""
        asked = ["--against", "b.atmc", "--n", 12, "--curves", 10, "--certify", 0.1, "--certify-samples", 200]
        asked += ["--no-checks", "--json"]
        monkeypatch.setattr(partial_results, "SAVE_EVERY", 0.0)
        assert run_evaluate("a.atmc", *asked, f"{function}.json", threat="l2:0.3") == 0
        measure, calls = getattr(module, function), []

        def counted(*arguments, **options):
            calls.append(arguments)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return measure(*arguments, **options)

        monkeypatch.setattr(module, function, counted)
        cut = f"{function}-cut.json"
        assert run_evaluate("a.atmc", *asked, cut, threat="l2:0.3") == 1
        assert sorted(path.name for path in here.glob(f"{cut}*")) == [
            f"{cut}.against.state", f"{cut}.parts.state", f"{cut}.state",
        ]  # fmt: skip
        assert "add --resume" in refused(capsys, "a.atmc", *asked, cut, threat="l2:0.3")
        monkeypatch.setattr(evaluate, "run_protocol", lambda *_, **__: iter(()))  # whose verdicts are the state's
        assert run_evaluate("a.atmc", *asked, cut, "--resume", threat="l2:0.3") == 0
        assert {**figures(f"{function}.json"), "seconds": 0} == {**figures(cut), "seconds": 0}
        assert len(calls) == 4 + count - 3
        assert list(here.glob(f"{cut}*")) == [here / cut]

    def test_what_a_kill_left_is_not_thrown_away(self, here, capsys):
        """Neither by a wrong name beside --overwrite nor by --resume without what it belongs to."""
        state = here / "z.json.against.state"
        state.write_bytes(b"dear")
        asked = ["--n", 5, "--no-checks", "--json", "z.json"]
        refused(capsys, "missing.atmc", *asked, "--overwrite")
        said = refused(capsys, "a.atmc", *asked, "--against", "missing.atmc", "--overwrite")
        assert "missing.atmc" in said
        assert "is not asked for now" in refused(capsys, "a.atmc", *asked, "--resume")
        assert state.read_bytes() == b"dear"
        assert run_evaluate("a.atmc", *asked, "--overwrite") == 0
        assert not state.exists()

    def test_more_may_be_asked_for_when_going_on(self, here, monkeypatch):
        """Certified radii stay where curves come to them; other numbers of samples are measured anew."""
        asked = ["--n", 3, "--no-checks", "--certify", 0.1, "--json", "w.json"]
        measure, calls = smoothing.certify_radius, []

        def cut_off(*arguments, **options):
            calls.append(arguments)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return measure(*arguments, **options)

        monkeypatch.setattr(partial_results, "SAVE_EVERY", 0.0)
        monkeypatch.setattr(smoothing, "certify_radius", cut_off)
        assert run_evaluate("a.atmc", *asked, "--certify-samples", 200, threat="l2:0.3") == 1
        more = [*asked, "--curves", 5, "--resume", "--certify-samples"]
        assert run_evaluate("a.atmc", *more, 200, threat="l2:0.3") == 0
        assert len(calls) == 3 + 1
        assert figures("w.json")["smoothing"]["n"] == 3

    def test_a_state_of_other_curves(self, here, capsys):
        state = here / "y.json.parts.state"
        asked = ["a.atmc", "--n", 5, "--curves", 5, "--no-checks", "--json", "y.json", "--resume"]
        for text, said in (
            ('{"mark": "another", "parts": {}}', "is of another measurement"),
            ('{"parts": {}}', "is not the state of a measurement"),
            ("[]", "is not the state of a measurement"),
            ("rubbish", "is not the state of a measurement"),
        ):
            state.write_text(text)
            assert said in refused(capsys, *asked)
            assert not (here / "y.json").exists()

    def test_nothing_is_judged_twice(self, here):
        """Going on really goes on: a finished attack in the state is not run again, whatever its verdicts say."""
        model = atmc.load("a.atmc", factory=sys.modules["assess_models"].build)
        test = atmc.load_data("digits").test
        options = evaluate.EvaluationOptions(attacks=("pgd",), n=20, checks=False, state=here / "state")
        events = evaluate.run_evaluation(model, test, "linf:0.05", options)
        next(events)
        stored = Verdicts.fresh(test, 20, keep=False)
        stored.start = 20  # all judged, all wrong
        events.close()
        mark = None
        original = resume.compute_fingerprint
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resume, "compute_fingerprint", lambda *a, **k: "mark")
            mark = resume.compute_fingerprint(model, test, 20)
            resume.write_state(here / "state", {"pgd": (mark, stored)})
            *_, report = evaluate.run_evaluation(model, test, "linf:0.05", options)
        assert report.attacks["pgd"].accuracy == 0
        assert original is resume.compute_fingerprint

    def test_a_state_of_something_else(self, here, capsys):
        resume.write_state(
            here / "x.json.state", {"pgd": ("another", Verdicts.fresh(atmc.load_data("digits").test, 5, keep=False))}
        )
        said = refused(capsys, "a.atmc", "--n", 5, "--no-checks", "--json", "x.json")
        assert "holds an unfinished evaluation: add --resume to continue it or --overwrite" in said
        said = refused(capsys, "a.atmc", "--n", 5, "--no-checks", "--json", "x.json", "--resume")
        assert "is of another evaluation" in said
        (here / "x.json.state").write_bytes(b"rubbish")
        said = refused(capsys, "a.atmc", "--n", 5, "--no-checks", "--json", "x.json", "--resume")
        assert "is not the state of an evaluation" in said
        assert run_evaluate("a.atmc", "--n", 5, "--no-checks", "--json", "x.json", "--overwrite") == 0
        assert "--resume needs --json" in refused(capsys, "a.atmc", "--resume")

    def test_interrupted(self, here, capsys, monkeypatch):
        def interrupted(request):
            raise KeyboardInterrupt
            yield

        monkeypatch.setattr("atmc.commands.evaluate.evaluate", interrupted)
        assert run_evaluate("a.atmc", "--json", "never.json") == 1
        assert "continue with the same command and --resume" in capsys.readouterr().out

    def test_every_deciding_thing_is_in_the_fingerprint(self, here):
        model, test = trained(), atmc.load_data("digits").test
        marks = {
            resume.compute_fingerprint(model, test, 20, seed=0),
            resume.compute_fingerprint(model, test, 21, seed=0),
        }
        marks |= {resume.compute_fingerprint(model, test, 20, seed=1)}
        with torch.no_grad():
            model[1].bias[0] += 1e-6
        marks |= {resume.compute_fingerprint(model, test, 20, seed=0)}
        assert len(marks) == 4
        assert resume.compute_fingerprint(model, test, 20, seed=0) in marks


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--attack", "cw"], "attack 'cw' exists for l2 only, the threat is linf:0.05"),
            (["--attack", "autoatack"], "did you mean 'autoattack'?"),
            (["--attack", "pgd,pgd"], "each attack once"),
            (["--attack", "square", "--restarts", "3"], "are of pgd, which is not among"),
            (["--time", "0"], "expected a time > 0 seconds"),
            (["--batch-size", "0"], "batch_size >= 1"),
            (["--curves", "0"], "at least 1 image for the curves"),
            (["--certify", "0.25"], "certifies l2 only, the threat is linf:0.05"),
            (["--save-examples", "examples.pkl"], "ends in .npz"),
            (["--save-examples", "nowhere/examples.npz"], "there is no folder nowhere"),
            (["--gallery", "a.atmc"], "exists: add --overwrite"),
            (["--replay", "nothing.npz"], "there is no file nothing.npz"),
            (["--replay", "a.atmc"], "holds no saved adversarial examples"),
            (["--transfer-from", "nothing.atmc"], "No such file"),
        ],
    )
    def test_options(self, here, capsys, monkeypatch, options, message):
        def attacked(*_, **__):
            raise AssertionError("attacked first")

        monkeypatch.setattr(evaluate, "run_protocol", attacked)
        assert message in refused(capsys, "a.atmc", *options)

    @pytest.mark.parametrize(
        ("threat", "message"),
        [
            ("linf:8", "eps 8 is above the largest linf distance in [0, 1]: 1 for images of 784 values; is linf:8/255"),
            ("l2:128", "is l2:128/255 meant?"),
            ("l1:3000", "is l1:3000/255 meant?"),
        ],
    )
    def test_eps_of_the_wrong_scale(self, here, capsys, threat, message):
        assert message in refused(capsys, "a.atmc", threat=threat)

    def test_a_file_for_another_size(self, here, capsys):
        """Also where the model would take the images all the same, as this one."""
        said = refused(capsys, "small.atmc")
        assert "small.atmc is for images of shape (1, 14, 56) and does not take images of shape (1, 28, 28)" in said
        assert "small.atmc is for images of shape" in refused(capsys, "a.atmc", "--n", 2, "--against", "small.atmc")

    def test_examples_of_another_size(self, here, capsys):
        about = {"adv": np.zeros((2, 1, 9, 9), np.float32), "about": np.array("{}")}
        rest = {name: np.zeros(2, np.int64) for name in ("labels", "predictions")}
        np.savez("nine.npz", **about, **rest, fooled=np.zeros(2, bool))
        assert "nine.npz holds images of shape (1, 9, 9)" in refused(capsys, "a.atmc", "--replay", "nine.npz")

    def test_no_images_and_strange_labels(self, here):
        model = trained()
        x = torch.rand(4, 1, 28, 28)
        with pytest.raises(ValueError, match="at least one image"):
            atmc.evaluate(model, (x[:0], torch.zeros(0, dtype=torch.int64)), threat="linf:0.1")
        with pytest.raises(ValueError, match="the labels go up to 10"):
            atmc.evaluate(model, (x, torch.arange(4) + 7), threat="linf:0.1")
        with pytest.raises(ValueError, match="expected labels >= 0"):
            atmc.evaluate(model, (x, torch.arange(4) - 1), threat="linf:0.1")
