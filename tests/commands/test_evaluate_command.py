"""`atmc evaluate`: what it prints, writes and refuses, and that it continues after a kill to the same figures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from command_line import call
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import atmc
from atmc.commands import evaluate as evaluations
from atmc.commands.evaluate import name_files
from atmc.evaluation import adversarial_file, curves, evaluate, resume, smoothing
from atmc.evaluation.accuracy import BatchAttacked
from atmc.evaluation.verdicts import Verdicts

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


def fit_linear() -> nn.Module:
    """Fit a linear model of the digits by a few steps of least squares on one-hot labels."""
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
    """Make a folder with two models of the digits, a.atmc and the weaker b.atmc, and their classes to import."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "command_models.py").write_text(MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        import command_models

        model = command_models.build(10)
        model.load_state_dict(fit_linear().state_dict())
        atmc.save(model, "a.atmc", input_shape=(1, 28, 28))
        with torch.no_grad():
            model[1].weight[3].zero_()
        atmc.save(model, "b.atmc", input_shape=(1, 28, 28))
        atmc.save(model, "small.atmc", input_shape=(1, 14, 56))
        yield folder
    sys.modules.pop("command_models", None)


def command_of(
    file: object, *options: object, threat: str = "linf:0.05", model: str = "command_models:build"
) -> list[object]:
    return ["evaluate", file, "--data", "digits", "--threat", threat, "--model", model, *options]


def test_figures_are_kept_if_a_picture_cannot_be_drawn(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluations, "draw_gallery", fail)
    options = ["--n", 5, "--attack", "fgsm", "--no-checks", "--json", tmp_path / "a.json"]
    assert run_evaluate("a.atmc", *options, "--gallery", tmp_path / "a.png") != 0
    assert json.loads((tmp_path / "a.json").read_text())["attacks"]["fgsm"]["n"] == 5


def test_a_gallery_without_fooled_images(tmp_path):
    options = ["--n", 5, "--attack", "fgsm", "--no-checks", "--gallery", tmp_path / "a.png"]
    assert run_evaluate("a.atmc", *options, threat="linf:0.0001") == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def run_evaluate(file: object, *options: object, threat: str = "linf:0.05", model: str = "command_models:build") -> int:
    return call(*command_of(file, *options, threat=threat, model=model))


def expect_refusal(capsys: pytest.CaptureFixture[str], *arguments: object, **options: str) -> str:
    return command_line.expect_refusal(capsys, *command_of(*arguments, **options))


def figures(path: str) -> dict:
    return json.loads(Path(path).read_text())


class TestDone:
    def test_everything_at_once(self, here, capsys):
        wanted = ["--attack", "pgd,fgsm", "--n", 60, "--json", "all.json", "--against", "b.atmc", "--curves", 20]
        wanted += ["--save-examples", "all.npz", "--gallery", "all.png", "--per-class", "--transfer-from", "b.atmc"]
        assert run_evaluate("a.atmc", *wanted) == 0
        text = capsys.readouterr().out
        document = figures("all.json")
        assert set(document["attacks"]) == {"pgd", "fgsm"}
        assert document["worst_case"]["of"] == ["pgd", "fgsm"]
        assert document["worst_case"]["accuracy"] <= min(attack["accuracy"] for attack in document["attacks"].values())
        assert [check["name"] for check in document["checks"]][-1] == "transfer"
        assert document["checks"][-1]["ok"] is True
        assert document["against"]["comparison"]["clean"]["verdict"] == "A is better"
        assert set(document["against"]["comparison"]) == {"clean", "pgd", "fgsm"}
        eps = [point["accuracy"] for point in document["curves"]["eps"]]
        assert eps == sorted(eps, reverse=True)
        assert document["curves"]["eps"][0]["eps"] == 0
        assert sum(row["n"] for row in document["per_class"]["pgd"]) == 60
        right = sum(round(row["accuracy"] * row["n"]) for row in document["per_class"]["pgd"])
        assert right == round(document["attacks"]["pgd"]["accuracy"] * 60)
        for name, accuracy in {"clean": document["clean"], **document["attacks"]}.items():
            assert len(document["wrong"][name]) == round((1 - accuracy["accuracy"]) * accuracy["n"])
        assert {row for row in document["wrong"]["clean"] if row < 60} <= set(document["wrong"]["pgd"])
        for word in ("checks of the evaluation", "McNemar", "accuracy against eps", "by class", "passed"):
            assert word in text
        assert "WARNING" not in text
        with Image.open("all.png") as image:
            assert image.format == "PNG"
            assert image.size[0] > 3 * 112
        examples = adversarial_file.read("all.npz")
        assert examples.adv.shape == (60, 1, 28, 28)
        model = atmc.load("a.atmc", factory=sys.modules["command_models"].build)
        assert torch.equal(model(examples.adv).argmax(1), examples.predictions)
        assert float((examples.predictions == examples.labels).float().mean()) == pytest.approx(
            document["worst_case"]["accuracy"], abs=1e-6
        )

    def test_replay(self, here, capsys):
        """The model attacked agrees with itself on every image, and another one does not."""
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
        atmc.save(sys.modules["command_models"].Probabilities(10), "soft.atmc", input_shape=(1, 28, 28))
        assert run_evaluate("soft.atmc", "--n", 30, model="command_models:Probabilities") == 0
        text = capsys.readouterr().out
        assert "FAILED, DO NOT TRUST THESE FIGURES" in text
        assert "NOT TO BE TRUSTED" in text
        assert "logits" in text
        assert run_evaluate("a.atmc", "--n", 30, "--no-checks") == 0
        assert "checks of the evaluation" not in capsys.readouterr().out

    def test_checkpoints(self, here, capsys):
        """Weights can be in other files, with a zoo model named by --model."""
        model = atmc.load("a.atmc", factory=sys.modules["command_models"].build)
        torch.save(model.state_dict(), "a.pt")
        save_file(model.state_dict(), "a.safetensors")
        attacks = []
        for name in ("a.atmc", "a.pt", "a.safetensors"):
            assert run_evaluate(name, "--n", 20, "--no-checks", "--json", "weights.json", "--overwrite") == 0
            attacks.append(figures("weights.json")["attacks"])
        assert attacks[0] == attacks[1] == attacks[2]
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
        pgd = figures("custom.json")["attacks"]["pgd"]
        assert (pgd["steps"], pgd["step_size"], pgd["restarts"], pgd["loss"]) == (3, 0.02, 2, "dlr")

    def test_certify(self, here, capsys):
        options = ["--n", 4, "--no-checks", "--certify", 0.25, "--certify-samples", 1000, "--json", "certify.json"]
        assert run_evaluate("a.atmc", *options, threat="l2:0.25") == 0
        certificate = figures("certify.json")["smoothing"]
        assert certificate["failure_probability"] == 0.001
        assert certificate["n"] == 4
        assert [point["radius"] for point in certificate["curve"]][:3] == [0, 0.0625, 0.125]
        shares = [point["accuracy"] for point in certificate["curve"]]
        assert shares == sorted(shares, reverse=True)
        assert "accuracy certified by smoothing" in capsys.readouterr().out


def _error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert call(*arguments) == 2
    return capsys.readouterr().err


class TestResume:
    OPTIONS = ("--attack", "pgd-strong,apgd-ce", "--n", 60, "--batch-size", 10, "--no-checks", "--save-examples")

    def test_killed_and_resumed(self, here, monkeypatch):
        """After SIGKILL in the middle, --resume ends in the figures and images of an undisturbed run."""
        assert run_evaluate("a.atmc", *self.OPTIONS, "whole.npz", "--json", "whole.json") == 0
        code = "from atmc.cli.main import main; from atmc.evaluation import resume; resume.SAVE_EVERY = 0.0; main()"
        command = [sys.executable, "-c", code, "evaluate", "a.atmc", "--data", "digits", "--threat", "linf:0.05"]
        command += ["--model", "command_models:build", *map(str, self.OPTIONS), "cut.npz", "--json", "cut.json"]
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
    def test_curves_and_certificate_continue(self, here, monkeypatch, capsys, module, function, count):
        """Nothing that was measured before an interruption is measured again."""
        asked = ["--against", "b.atmc", "--n", 12, "--curves", 10, "--certify", 0.1, "--certify-samples", 200]
        asked += ["--no-checks", "--json"]
        monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
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
        assert "add --resume" in expect_refusal(capsys, "a.atmc", *asked, cut, threat="l2:0.3")
        monkeypatch.setattr(evaluate, "run_protocol", lambda *_, **__: iter(()))  # whose verdicts are the state's
        assert run_evaluate("a.atmc", *asked, cut, "--resume", threat="l2:0.3") == 0
        assert {**figures(f"{function}.json"), "seconds": 0} == {**figures(cut), "seconds": 0}
        assert len(calls) == 4 + count - 3
        assert list(here.glob(f"{cut}*")) == [here / cut]

    def test_states_are_not_deleted_by_mistake(self, here, capsys):
        """Neither --overwrite with a wrong name nor --resume without the option of the state deletes a state."""
        state = here / "z.json.against.state"
        state.write_bytes(b"a state")
        asked = ["--n", 5, "--no-checks", "--json", "z.json"]
        expect_refusal(capsys, "missing.atmc", *asked, "--overwrite")
        message = expect_refusal(capsys, "a.atmc", *asked, "--against", "missing.atmc", "--overwrite")
        assert "missing.atmc" in message
        assert "is not asked for now" in expect_refusal(capsys, "a.atmc", *asked, "--resume")
        assert state.read_bytes() == b"a state"
        assert run_evaluate("a.atmc", *asked, "--overwrite") == 0
        assert not state.exists()

    def test_options_may_be_added_with_resume(self, here, monkeypatch):
        """Certified radii are kept if curves are added; with another number of samples they are measured again."""
        asked = ["--n", 3, "--no-checks", "--certify", 0.1, "--json", "w.json"]
        measure, calls = smoothing.certify_radius, []

        def cut_off(*arguments, **options):
            calls.append(arguments)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return measure(*arguments, **options)

        monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
        monkeypatch.setattr(smoothing, "certify_radius", cut_off)
        assert run_evaluate("a.atmc", *asked, "--certify-samples", 200, threat="l2:0.3") == 1
        more = [*asked, "--curves", 5, "--resume", "--certify-samples"]
        assert run_evaluate("a.atmc", *more, 200, threat="l2:0.3") == 0
        assert len(calls) == 3 + 1
        assert figures("w.json")["smoothing"]["n"] == 3

    def test_a_state_of_other_curves(self, here, capsys):
        state = here / "y.json.parts.state"
        asked = ["a.atmc", "--n", 5, "--curves", 5, "--no-checks", "--json", "y.json", "--resume"]
        for text, message in (
            ('{"mark": "another", "parts": {}}', "is of another measurement"),
            ('{"parts": {}}', "is not the state of a measurement"),
            ("[]", "is not the state of a measurement"),
            ("rubbish", "is not the state of a measurement"),
        ):
            state.write_text(text)
            assert message in expect_refusal(capsys, *asked)
            assert not (here / "y.json").exists()

    def test_a_finished_attack_is_not_run_again(self, here):
        """The verdicts of a finished attack are taken from the state."""
        model = atmc.load("a.atmc", factory=sys.modules["command_models"].build)
        test = atmc.load_data("digits").test
        options = evaluate.EvaluationOptions(attacks=("pgd",), n=20, checks=False, state=here / "state")
        events = evaluate.run_evaluation(model, test, "linf:0.05", options)
        next(events)
        stored = Verdicts.fresh(test, 20, keep=False)
        stored.start = 20  # all finished, all wrong
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
        message = expect_refusal(capsys, "a.atmc", "--n", 5, "--no-checks", "--json", "x.json")
        assert "holds an unfinished evaluation: add --resume to continue it or --overwrite" in message
        message = expect_refusal(capsys, "a.atmc", "--n", 5, "--no-checks", "--json", "x.json", "--resume")
        assert "is of another evaluation" in message
        (here / "x.json.state").write_bytes(b"rubbish")
        message = expect_refusal(capsys, "a.atmc", "--n", 5, "--no-checks", "--json", "x.json", "--resume")
        assert "is not the state of an evaluation" in message
        assert run_evaluate("a.atmc", "--n", 5, "--no-checks", "--json", "x.json", "--overwrite") == 0
        assert "--resume needs --json" in expect_refusal(capsys, "a.atmc", "--resume")

    def test_interrupted(self, here, capsys, monkeypatch):
        def interrupted(request):
            raise KeyboardInterrupt
            yield

        monkeypatch.setattr("atmc.commands.evaluate.evaluate", interrupted)
        assert run_evaluate("a.atmc", "--json", "never.json") == 1
        assert "continue with the same command and --resume" in capsys.readouterr().out

    def test_every_input_of_the_result_is_in_the_fingerprint(self, here):
        model, test = fit_linear(), atmc.load_data("digits").test
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


class TestSeveralFiles:
    OPTIONS = ("--attack", "pgd,fgsm", "--n", 20, "--no-checks")

    def several(self, folder: object, *options: object) -> list[object]:
        return ["evaluate", "a.atmc", "b.atmc", "runs/c/model.atmc", *command_of("", *self.OPTIONS)[2:], *options,
                "--json", folder]  # fmt: skip

    @pytest.fixture(autouse=True)
    def run_folder(self, here):
        (here / "runs" / "c").mkdir(parents=True, exist_ok=True)
        (here / "runs" / "c" / "model.atmc").write_bytes((here / "a.atmc").read_bytes())

    def test_each_file_has_its_figures_and_all_have_a_summary(self, here, capsys):
        assert call(*self.several("each")) == 0
        text = capsys.readouterr().out
        assert sorted(path.name for path in (here / "each").iterdir()) == ["a.json", "b.json", "c.json"]
        for name in ("a", "b"):
            assert run_evaluate(f"{name}.atmc", *self.OPTIONS, "--json", "alone.json", "--overwrite") == 0
            assert {**figures("alone.json"), "seconds": 0} == {**figures(f"each/{name}.json"), "seconds": 0}
        summary = text[text.index("all models") :]
        for file, accuracy in (("b.atmc", figures("each/b.json")["clean"]), ("runs/c/model.atmc", None)):
            assert file in summary
            assert accuracy is None or f"{accuracy['accuracy']:.2%}" in summary
        assert "not run" in summary

    def test_one_file_into_a_folder(self, here):
        (here / "one").mkdir()
        assert run_evaluate("a.atmc", *self.OPTIONS, "--json", "one") == 0
        assert [path.name for path in (here / "one").iterdir()] == ["a.json"]

    def test_an_interrupted_call_continues(self, here, monkeypatch, capsys):
        """Finished files are not evaluated again, the unfinished one from its state, the others from the start."""
        assert call(*self.several("whole")) == 0
        run_protocol, attacks = evaluate.run_protocol, []

        def interrupted(*arguments, **options):
            attacks.append(arguments[2].attack)
            if len(attacks) == 4:  # fgsm on the second file
                raise KeyboardInterrupt
            return run_protocol(*arguments, **options)

        monkeypatch.setattr(evaluate, "run_protocol", interrupted)
        assert call(*self.several("cut")) == 1
        assert sorted(path.name for path in (here / "cut").iterdir()) == ["a.json", "b.json.state"]
        before = (here / "cut" / "a.json").read_bytes()
        assert "a.json exists: add --overwrite" in command_line.expect_refusal(capsys, *self.several("cut"))
        assert call(*self.several("cut", "--resume")) == 0
        assert "all models" in capsys.readouterr().out
        assert (here / "cut" / "a.json").read_bytes() == before
        assert attacks[4:] == [
            "pgd",
            "fgsm",
            "pgd",
            "fgsm",
        ]  # of the second file, from its state, and the third
        for name in ("a", "b", "c"):
            one, two = (figures(f"{folder}/{name}.json") for folder in ("whole", "cut"))
            assert {**one, "seconds": 0} == {**two, "seconds": 0}
        assert not list((here / "cut").glob("*.state"))

    def test_only_the_same_request_is_finished(self, here, capsys):
        folder = here / "same"
        assert call(*self.several(folder)) == 0
        attack_again = [*self.several(folder, "--resume"), "--n", 10]
        message = command_line.expect_refusal(capsys, *attack_again)
        assert "a.json is of another evaluation (n was 20, is 10): add --overwrite to replace it" in message
        assert call(*attack_again, "--overwrite") == 0
        assert figures(folder / "c.json")["attacks"]["pgd"]["n"] == 10
        (here / "runs" / "c" / "model.atmc").write_bytes((here / "b.atmc").read_bytes())
        assert "c.json is of another evaluation (file was" in command_line.expect_refusal(capsys, *attack_again)
        (folder / "c.json").write_text("mine")
        assert "c.json exists: add --overwrite" in command_line.expect_refusal(capsys, *attack_again)

    @pytest.mark.parametrize(
        ("files", "names"),
        [
            (["a.atmc", "x/b.atmc", "c.pt"], ["a", "b", "c.pt"]),
            (["runs/a/model.atmc", "runs/b/model.atmc"], ["a", "b"]),
            (["mnist/a/model.atmc", "digits/a/model.atmc", "b.atmc"], ["mnist-a", "digits-a", "b"]),
            (["x/a.atmc", "x/a/model.atmc", "y/a.atmc", "y/x/a.atmc"], None),
            (["1/x/a.atmc", "2/x/a.atmc", "x/b.atmc"], ["1-x-a", "2-x-a", "b"]),
        ],
    )
    def test_names(self, files, names):
        if names is None:
            with pytest.raises(ValueError, match=r"x/a\.atmc and x/a/model\.atmc would be written to the same file"):
                name_files(list(map(Path, files)))
        else:
            assert name_files(list(map(Path, files))) == names

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["a.atmc", "a.atmc"], "a.atmc and a.atmc would be written to the same file"),
            (["a.atmc", "missing.atmc"], "missing.atmc: No such file"),
            (["a.atmc", "b.atmc", "--save-examples", "x.npz"], "evaluate one file at a time"),
            (["a.atmc", "b.atmc", "--gallery", "x.png"], "evaluate one file at a time"),
            (["a.atmc", "b.atmc", "--json", "b.atmc", "--overwrite"], "b.atmc is a file: give a folder"),
            (["a.atmc", "b.atmc", "--json", "no/folder"], "there is no folder no"),
        ],
    )
    def test_refused(self, here, capsys, monkeypatch, options, message):
        def attacked(*_, **__):
            raise AssertionError("attacked first")

        monkeypatch.setattr(evaluate, "run_protocol", attacked)
        options = options if "--json" in options else [*options, "--json", "refused"]
        assert message in command_line.expect_refusal(capsys, *command_of(options[0], *options[1:]))
        assert not (here / "refused").exists()


class TestAfter:
    """Attacks on the images that a first attack left: our own attacks give the worst case, image by image."""

    def verdicts(self, **options: object) -> dict[str, torch.Tensor]:
        test = atmc.load_data("digits").test
        report = atmc.evaluate(fit_linear(), test, threat="linf:0.05", n=80, checks=False, **options)
        return {name: accuracy.right for name, accuracy in report.attacks.items()}

    @pytest.mark.parametrize(("first", "second"), [("pgd", "pgd-strong"), ("pgd-strong", "pgd"), ("fgsm", "pgd")])
    def test_the_worst_case_of_both(self, first, second):
        whole = self.verdicts(attack=[first, second])
        after = self.verdicts(attack=second, after=first)
        assert list(after) == [first, second]
        assert torch.equal(after[first], whole[first])
        assert torch.equal(after[second], whole[first] & whole[second])
        assert 0 < int(after[second].sum()) < 80

    def test_only_what_was_left_is_attacked(self):
        options = evaluate.EvaluationOptions(attacks=("apgd-ce",), after="pgd-strong", n=80, checks=False)
        attacked = 0
        for event in evaluate.run_evaluation(fit_linear(), atmc.load_data("digits").test, "linf:0.05", options):
            if isinstance(event, BatchAttacked) and event.attack == "apgd-ce":
                attacked = max(attacked, event.verdicts.done)
        first, second = event.attacks["pgd-strong"].right, event.attacks["apgd-ce"].right
        assert attacked == int(first.sum())
        assert not bool((second & ~first).any())

    def test_the_command_says_so(self, here, capsys):
        options = ["--attack", "autoattack", "--after", "pgd", "--n", 30, "--no-checks", "--json", "after.json"]
        assert run_evaluate("a.atmc", *options) == 0
        attacks = figures("after.json")["attacks"]
        assert list(attacks) == ["pgd", "autoattack"]
        assert "survivors_of" not in attacks["pgd"]
        assert attacks["autoattack"]["survivors_of"] == "pgd"
        assert attacks["autoattack"]["n"] == 30
        assert max(attacks["autoattack"]["after"].values()) <= attacks["pgd"]["accuracy"]
        assert figures("after.json")["worst_case"]["accuracy"] == attacks["autoattack"]["accuracy"]

    def test_images_that_the_first_attack_did_not_see(self):
        """Images that the first attack did not see are attacked."""
        test = atmc.load_data("digits").test
        n = {"fgsm": 30, "pgd": 60}
        after = atmc.evaluate(fit_linear(), test, threat="linf:0.05", attack="pgd", after="fgsm", n=n, checks=False)
        whole = atmc.evaluate(fit_linear(), test, threat="linf:0.05", attack=["pgd", "fgsm"], n=n, checks=False)
        assert torch.equal(after.attacks["pgd"].right[30:], whole.attacks["pgd"].right[30:])
        assert torch.equal(
            after.attacks["pgd"].right[:30], whole.attacks["pgd"].right[:30] & whole.attacks["fgsm"].right
        )

    def test_an_interrupted_evaluation_continues(self, here, monkeypatch):
        options = ["--attack", "pgd-strong", "--after", "fgsm", "--n", 60, "--batch-size", 10, "--no-checks", "--json"]
        assert run_evaluate("a.atmc", *options, "after-whole.json") == 0
        run_protocol, batches = evaluate.run_protocol, []

        def interrupted(*arguments, **options):
            for event in run_protocol(*arguments, **options):
                yield event
                batches.append(event)
                if len(batches) == 10:
                    raise KeyboardInterrupt

        monkeypatch.setattr(evaluate, "run_protocol", interrupted)
        monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
        assert run_evaluate("a.atmc", *options, "after-cut.json") == 1
        assert batches[-1].attack == "pgd-strong"
        assert run_evaluate("a.atmc", *options, "after-cut.json", "--resume") == 0
        assert figures("after-cut.json")["attacks"] == figures("after-whole.json")["attacks"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--after", "pgdstrong"], "did you mean 'pgd-strong'"),
            (["--after", "pgd"], "expected an attack to run after 'pgd'"),
            (["--after", "cw"], "attack 'cw' exists for l2 only"),
        ],
    )
    def test_refused(self, here, capsys, options, message):
        assert message in expect_refusal(capsys, "a.atmc", *options)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--attack", "cw"], "attack 'cw' exists for l2 only, the threat is linf:0.05"),
            (["--attack", "autoatack"], "did you mean 'autoattack'?"),
            (["--attack", "pgd,pgd"], "each attack once"),
            (["--attack", "square", "--restarts", "3"], "are for pgd and pgd-strong, the attacks are square"),
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
        assert message in expect_refusal(capsys, "a.atmc", *options)

    @pytest.mark.parametrize(
        ("threat", "message"),
        [
            ("linf:8", "eps 8 is above the largest linf distance in [0, 1]: 1 for images of 784 values; is linf:8/255"),
            ("l2:128", "is l2:128/255 meant?"),
            ("l1:3000", "is l1:3000/255 meant?"),
        ],
    )
    def test_eps_of_the_wrong_scale(self, here, capsys, threat, message):
        assert message in expect_refusal(capsys, "a.atmc", threat=threat)

    def test_a_file_for_another_size(self, here, capsys):
        """It is refused even if the model would take the images, as this one."""
        message = expect_refusal(capsys, "small.atmc")
        assert "small.atmc is for images of shape (1, 14, 56) and does not take images of shape (1, 28, 28)" in message
        message = expect_refusal(capsys, "a.atmc", "--n", 2, "--against", "small.atmc")
        assert "small.atmc is for images of shape" in message

    def test_examples_of_another_size(self, here, capsys):
        images = {"adv": np.zeros((2, 1, 9, 9), np.float32), "about": np.array("{}")}
        rest = {name: np.zeros(2, np.int64) for name in ("labels", "predictions")}
        np.savez("nine.npz", **images, **rest, fooled=np.zeros(2, bool))
        assert "nine.npz holds images of shape (1, 9, 9)" in expect_refusal(capsys, "a.atmc", "--replay", "nine.npz")

    def test_no_images_and_strange_labels(self, here):
        model = fit_linear()
        x = torch.rand(4, 1, 28, 28)
        with pytest.raises(ValueError, match="at least one image"):
            atmc.evaluate(model, (x[:0], torch.zeros(0, dtype=torch.int64)), threat="linf:0.1")
        with pytest.raises(ValueError, match="the labels go up to 10"):
            atmc.evaluate(model, (x, torch.arange(4) + 7), threat="linf:0.1")
        with pytest.raises(ValueError, match="expected labels >= 0"):
            atmc.evaluate(model, (x, torch.arange(4) - 1), threat="linf:0.1")
