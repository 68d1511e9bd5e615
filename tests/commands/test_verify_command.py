"""`atmc verify`: what it prints, writes and refuses, and that it continues after a kill to the same verdicts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import command_line
import pytest
import torch
from command_line import call
from small_networks import HIDDEN, train_on_digits

import atmc
from atmc.evaluation import adversarial_file, resume
from atmc.evaluation.verify import stages

MODELS = f"""{HIDDEN}
def smooth(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.Tanh(), nn.Linear(4, num_classes))
"""


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """Make a folder with a small trained network of the digits, a.atmc, one without a rule, and their classes."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "verify_models.py").write_text(MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        import verify_models

        model = train_on_digits(verify_models.build(10))
        atmc.save(model, "a.atmc", input_shape=(1, 28, 28))
        atmc.save(verify_models.smooth(10), "smooth.atmc", input_shape=(1, 28, 28))
        atmc.save(model, "small.atmc", input_shape=(1, 14, 56))
        Path("there.npz").touch()
        yield folder
    sys.modules.pop("verify_models", None)


def command_of(file: object, *options: object, threat: str = "linf:0.03", model: str = "build") -> list[object]:
    return ["verify", file, "--data", "digits", "--threat", threat, "--model", f"verify_models:{model}", *options]


def run_verify(file: object, *options: object, **rest: str) -> int:
    return call(*command_of(file, *options, **rest))


def expect_refusal(capsys: pytest.CaptureFixture[str], *arguments: object, **rest: str) -> str:
    return command_line.expect_refusal(capsys, *command_of(*arguments, **rest))


def figures(path: str) -> dict:
    """Read figures; those of time are left out."""
    document = json.loads(Path(path).read_text())
    for row in [*document["stages"], *document.get("complete", {}).get("by_image", ())]:
        del row["seconds"]
    document.get("complete", {}).pop("seconds", None)
    return document


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for a condition, at most two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def running(group: int) -> list[int]:
    """Return the processes of a group that have not ended."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own_group, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended since
            continue
        if int(own_group) == group and state != "Z":
            processes.append(int(path.parent.name))
    return processes


class TestDone:
    def test_tables_and_json(self, here, capsys):
        assert run_verify("a.atmc", "--n", 80, "--linear", "--json", "done.json", threat="linf:0.05") == 0
        text, document = capsys.readouterr().out, figures("done.json")
        certified, attacked = document["certified"], document["attacked"]
        assert 0 < certified["accuracy"] < attacked["accuracy"] < document["clean"]["accuracy"]
        assert set(certified) == {"accuracy", "n", "ci95", "eps", "by", "undecided"}
        assert certified["eps"] == 0.05
        assert certified["by"].keys() == {"interval", "linear"}
        assert sum(certified["by"].values()) == pytest.approx(certified["accuracy"])
        assert min(certified["by"].values()) > 0
        assert attacked["accuracy"] - certified["accuracy"] == pytest.approx(certified["undecided"], abs=1e-5)
        assert attacked["attacks"]["pgd-strong"]["restarts"] == 5
        assert len(document["decided_by"]) == 80
        assert [stage["stage"] for stage in document["stages"]] == [
            "clean",
            "interval",
            "pgd-strong",
            "interval-pgd",
            "linear",
        ]
        for stage in document["stages"]:
            assert document["decided_by"].count(stage["stage"]) == stage["decided"] == stage[stage["verdict"]]
        assert document["verdicts"].count("certified") == round(80 * certified["accuracy"])
        assert [stage is None for stage in document["decided_by"]] == [
            verdict == "undecided" for verdict in document["verdicts"]
        ]
        assert "complete" not in document
        for share in (certified["accuracy"], attacked["accuracy"], certified["undecided"]):
            assert f"{share:.2%}" in text
        for words in (
            "certified, under every attack: at least",
            "attacked: at most",
            "by stage",
        ):
            assert words in text
        assert "interval: " in text
        assert not list(here.glob("done.json.*"))

    def test_examples(self, here):
        """Each broken image comes with one that counts; `atmc evaluate` replays them."""
        options = ["--n", 40, "--save-examples", "broken.npz"]
        assert run_verify("a.atmc", *options, "--json", "examples.json", threat="linf:0.05") == 0
        document, examples = figures("examples.json"), adversarial_file.read("broken.npz")
        test = atmc.load_data("digits").test.take(slice(0, 40))
        attacked = [stage in ("pgd-strong", "interval-pgd") for stage in document["decided_by"]]
        assert examples.fooled.tolist() == attacked
        assert 0 < sum(attacked) < sum(verdict == "broken" for verdict in document["verdicts"]) < 40
        broken = [verdict == "broken" for verdict in document["verdicts"]]
        assert (examples.predictions != examples.labels).tolist() == broken
        distance = (examples.adv - test.float_pixels(slice(None))).flatten(1).abs().amax(1)
        assert bool((distance[examples.fooled] > 0.04).all())
        assert bool((distance <= 0.05 + 1e-6).all())
        assert torch.equal(examples.adv[~examples.fooled], test.float_pixels(~examples.fooled))
        assert examples.about.items() >= {"threat": "linf:0.05", "model": "a.atmc"}.items()
        command = ["evaluate", *command_of("a.atmc", "--n", 1, "--replay", "broken.npz", "--no-checks")[1:]]
        assert call(*command, "--json", "replayed.json") == 0
        replayed = json.loads(Path("replayed.json").read_text())["replay"]
        assert replayed["agreement"]["accuracy"] == 1
        assert replayed["accuracy"]["accuracy"] == document["attacked"]["accuracy"]

    def test_python_gives_the_same(self, here):
        assert run_verify("a.atmc", "--n", 40, "--json", "python.json") == 0
        model = atmc.load("a.atmc", factory=sys.modules["verify_models"].build)
        result = atmc.verify(model, atmc.load_data("digits").test, threat="linf:0.03", n=40)
        assert isinstance(result, atmc.Verification)
        assert list(result.decided_by) == figures("python.json")["decided_by"]

    def test_without_json(self, here, capsys):
        before = set(here.iterdir())
        assert run_verify("a.atmc", "--n", 10) == 0
        assert "certified" in capsys.readouterr().out
        assert {path for path in here.iterdir() if path.name != "__pycache__"} <= before

    def test_a_checkpoint(self, here):
        torch.save(atmc.load("a.atmc", factory=sys.modules["verify_models"].build).state_dict(), "weights.pt")
        assert run_verify("weights.pt", "--n", 30, "--json", "weights.json") == 0
        assert run_verify("a.atmc", "--n", 30, "--json", "file.json") == 0
        assert figures("weights.json")["decided_by"] == figures("file.json")["decided_by"]


class TestResume:
    ASKED = ("--n", 60, "--batch-size", 10, "--json")

    def start(self, path: Path, *options: object) -> subprocess.Popen:
        """Start the command in a group of processes of its own; it saves after every batch."""
        code = "from atmc.cli.main import main; from atmc.evaluation import resume; resume.SAVE_EVERY = 0.0; main()"
        command = [sys.executable, "-c", code, *map(str, command_of("a.atmc", *self.ASKED, path, *options))]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{path.parent}:{os.environ.get('PYTHONPATH', '')}",
        }
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    @pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
    def test_stopped_and_resumed(self, here, sent):
        """After SIGKILL or Ctrl-C all processes end, and --resume gives the verdicts of an undisturbed run."""
        path = here / f"{sent.name}.json"
        state = path.with_name(f"{path.name}.state")
        victim = self.start(path, "--processes", 2)
        wait_until(state.exists)
        if sent == signal.SIGINT:
            os.killpg(victim.pid, sent)  # as a terminal does
        else:
            victim.send_signal(sent)
        printed, errors = victim.communicate(timeout=120)
        wait_until(lambda: not running(victim.pid))
        if sent == signal.SIGINT:
            assert victim.returncode == 1
            assert "continue with the same command and --resume" in printed
            assert errors == "atmc: interrupted\n"
        assert not path.exists()
        assert json.loads(state.read_text())["parts"]
        assert run_verify("a.atmc", *self.ASKED, path, "--resume") == 0
        assert run_verify("a.atmc", *self.ASKED, path.with_name(f"{sent.name}-whole.json")) == 0
        assert figures(path) == figures(path.with_name(f"{sent.name}-whole.json"))
        assert not state.exists()

    def interrupt(self, monkeypatch: pytest.MonkeyPatch, function: str, calls_before: int) -> list[tuple]:
        """Let a function of the verification raise KeyboardInterrupt once; return the list of its calls."""
        original, calls = getattr(stages, function), []

        def interrupted(*arguments, **options):
            calls.append(arguments)
            if len(calls) == calls_before + 1:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        monkeypatch.setattr(stages, function, interrupted)
        return calls

    def test_nothing_is_measured_twice(self, here, monkeypatch, capsys):
        assert run_verify("a.atmc", *self.ASKED, "once.json") == 0
        calls = self.interrupt(monkeypatch, "predictions", 3)  # of the clean pass
        assert run_verify("a.atmc", *self.ASKED, "twice.json") == 1
        assert "continue with the same command and --resume" in capsys.readouterr().out
        message = expect_refusal(capsys, "a.atmc", *self.ASKED, "twice.json")
        assert "twice.json.state holds an unfinished verification: add --resume to continue it" in message
        assert run_verify("a.atmc", *self.ASKED, "twice.json", "--resume") == 0
        assert len(calls) == 6 + 1
        assert figures("twice.json") == figures("once.json")

    def test_finished(self, here, monkeypatch, capsys):
        """The figures of the same request are shown again; those of another one are not replaced."""
        assert run_verify("a.atmc", "--n", 10, "--json", "finished.json") == 0
        before = (here / "finished.json").read_bytes()
        self.interrupt(monkeypatch, "prove_executions", 0)
        capsys.readouterr()
        assert run_verify("a.atmc", "--n", 10, "--json", "finished.json", "--resume") == 0
        assert "certified" in capsys.readouterr().out
        assert (here / "finished.json").read_bytes() == before
        for options in (["--n", 11, "--resume"], ["--n", 10]):
            message = expect_refusal(capsys, "a.atmc", "--json", "finished.json", *options)
            assert "finished.json exists: add --overwrite" in message
        monkeypatch.undo()
        assert run_verify("a.atmc", "--n", 11, "--json", "finished.json", "--overwrite") == 0
        assert figures("finished.json")["certified"]["n"] == 11

    def test_stages_may_be_added(self, here, monkeypatch):
        """The verdicts of the stages before stand."""
        monkeypatch.setattr("atmc.evaluation.autoattack.QUERIES", 50)
        added = ("--linear", "--autoattack")
        assert run_verify("a.atmc", *self.ASKED, "added.json", *added, threat="linf:0.05") == 0
        whole = figures("added.json")
        calls = self.interrupt(monkeypatch, "run_protocol", 3)  # of PGD
        assert run_verify("a.atmc", *self.ASKED, "later.json", threat="linf:0.05") == 1
        assert len(calls) == 4
        assert run_verify("a.atmc", *self.ASKED, "later.json", *added, "--resume", threat="linf:0.05") == 0
        later = figures("later.json")
        assert {**later, "request": 0} == {**whole, "request": 0}
        assert whole["attacked"]["attacks"].keys() == {"pgd-strong", "interval-pgd", "autoattack"}
        assert {stage["stage"]: stage["images"] > 0 for stage in whole["stages"][4:]} == {"linear": 1, "autoattack": 1}

    def test_the_complete_method_continues_image_by_image(self, here, monkeypatch, capsys):
        """With another time limit only the images that were left undecided are searched again."""
        asked = (*self.ASKED, "part.json", "--resume", "--time-per-image")
        assert run_verify("a.atmc", *self.ASKED, "all.json", "--time-per-image", 20, threat="linf:0.1") == 0
        whole, text = figures("all.json"), capsys.readouterr().out
        images, by_image = whole["complete"]["images"], whole["complete"]["by_image"]
        assert images == len(by_image) > 2
        assert f"complete: {images} images, 0 undecided" in text
        assert [whole["decided_by"][one["row"]] for one in by_image] == ["complete"] * images
        assert [whole["verdicts"][one["row"]] for one in by_image] == [one["verdict"] for one in by_image]
        assert {one["verdict"] for one in by_image} == {"certified", "broken"}
        for key, verdict in (("certified", "by"), ("attacked", "broken_by")):
            assert whole[key][verdict]["complete"] > 0
        calls = self.interrupt(monkeypatch, "decide", 2)
        assert run_verify("a.atmc", *asked, 20, threat="linf:0.1") == 1
        assert run_verify("a.atmc", *asked, 20, threat="linf:0.1") == 0
        assert len(calls) == images + 1
        assert figures("part.json") == whole
        Path("part.json").unlink()
        monkeypatch.undo()
        calls = self.interrupt(monkeypatch, "decide", 2)
        counted = stages.decide

        def give_up_at_first(*arguments, **options):
            outcome = counted(*arguments, **options)
            return replace(outcome, verdict="undecided", image=None) if len(calls) == 1 else outcome

        monkeypatch.setattr(stages, "decide", give_up_at_first)
        assert run_verify("a.atmc", *asked, 20, threat="linf:0.1") == 1
        assert run_verify("a.atmc", *asked, 21, threat="linf:0.1") == 0
        assert len(calls) == 2 + 1 + (images - 1)
        assert figures("part.json")["verdicts"] == whole["verdicts"]

    def test_a_state_of_something_else(self, here, capsys):
        state = here / "x.json.state"
        state.write_text('{"mark": "another", "parts": {}}')
        assert "is of another measurement" in expect_refusal(capsys, "a.atmc", *self.ASKED, "x.json", "--resume")
        state.write_text("rubbish")
        assert "is not the state of a measurement" in expect_refusal(
            capsys, "a.atmc", *self.ASKED, "x.json", "--resume"
        )
        assert run_verify("a.atmc", "--n", 5, "--json", "x.json", "--overwrite") == 0
        assert not state.exists()

    def test_every_option_that_decides_is_in_the_fingerprint(self, here, monkeypatch, capsys):
        monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
        self.interrupt(monkeypatch, "prove_executions", 2)
        assert run_verify("a.atmc", *self.ASKED, "f.json") == 1
        monkeypatch.undo()
        for options in (["--n", 50], ["--batch-size", 20], ["--seed", 1]):
            message = expect_refusal(capsys, "a.atmc", *self.ASKED, "f.json", "--resume", *options)
            assert "is of another measurement" in message
        message = expect_refusal(capsys, "a.atmc", *self.ASKED, "f.json", "--resume", threat="linf:0.02")
        assert "is of another measurement" in message


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--resume"], "--resume needs --json"),
            (["--n", 0], "expected n >= 1"),
            (["--batch-size", 0], "batch_size >= 1"),
            (["--json", "no/figures.json"], "there is no folder no"),
            (["--json", "."], "is a folder"),
            (["--json", "a.atmc"], "a.atmc exists: add --overwrite"),
            (["--seed", -1], "seed"),
            (["--processes", 0], "expected processes >= 1, got 0"),
            (["--time-per-image", 0], "expected a finite time per image > 0 seconds, got 0"),
            (["--time-per-image", "inf"], "expected a finite time per image > 0 seconds, got inf"),
            (["--save-examples", "broken.png"], "expected a name that ends in .npz for the examples, got broken.png"),
            (["--save-examples", "no/broken.npz"], "there is no folder no"),
            (["--save-examples", "there.npz"], "there.npz exists: add --overwrite"),
        ],
    )
    def test_options(self, here, capsys, monkeypatch, options, message):
        def measured(*_, **__):
            raise AssertionError("verified first")

        monkeypatch.setattr("atmc.commands.verify.run_verification", measured)
        assert message in expect_refusal(capsys, "a.atmc", *options)

    @pytest.mark.parametrize(
        ("threat", "message"),
        [
            ("linf:0", "expected a finite eps > 0"),
            ("linf:8", "is linf:8/255 meant?"),
            ("l2:0.5", "proofs exist for linf only, got l2:0.5"),
            ("l1:2", "proofs exist for linf only, got l1:2"),
        ],
    )
    def test_threats(self, here, capsys, threat, message):
        assert message in expect_refusal(capsys, "a.atmc", threat=threat)

    def test_models(self, here, capsys):
        message = expect_refusal(capsys, "smooth.atmc", "--json", "smooth.json", model="smooth")
        assert "cannot verify the model: aten.tanh of layer 2 is not supported" in message
        assert not list(here.glob("smooth.json*"))
        assert "is for images of shape (1, 14, 56)" in expect_refusal(capsys, "small.atmc")
        assert "No such file" in expect_refusal(capsys, "missing.atmc")
        weights = atmc.load("a.atmc", factory=sys.modules["verify_models"].build).state_dict()
        weights["1.weight"][0, 0] = torch.nan
        torch.save(weights, "nan.pt")
        assert "holds nan or infinity" in expect_refusal(capsys, "nan.pt")
        without_model = ["verify", "nan.pt", "--data", "digits", "--threat", "linf:0.1"]
        assert "name their model with --model" in command_line.expect_refusal(capsys, *without_model)
