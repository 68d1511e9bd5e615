"""`atmc verify`: what it prints, writes and refuses, and that it continues after a kill to the same verdicts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import command_line
import pytest
import torch
from command_line import call
from torch import nn

import atmc
from atmc.evaluation import resume
from atmc.evaluation.verify import stages

MODELS = """
import torch
from torch import nn

def build(num_classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, num_classes))

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

        model, train = verify_models.build(10), atmc.load_data("digits").train
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(train.float_pixels(slice(None))), train.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        atmc.save(model, "a.atmc", input_shape=(1, 28, 28))
        atmc.save(verify_models.smooth(10), "smooth.atmc", input_shape=(1, 28, 28))
        atmc.save(model, "small.atmc", input_shape=(1, 14, 56))
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
    for stage in document["stages"]:
        del stage["seconds"]
    return document


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for a condition, at most a minute."""
    deadline = time.monotonic() + 60
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
        assert run_verify("a.atmc", "--n", 80, "--json", "done.json") == 0
        text, document = capsys.readouterr().out, figures("done.json")
        certified, attacked = document["certified"], document["attacked"]
        assert 0 < certified["accuracy"] < attacked["accuracy"] < document["clean"]["accuracy"]
        assert set(certified) == {"accuracy", "n", "ci95", "eps", "by", "undecided"}
        assert certified["eps"] == 0.03
        assert certified["by"] == {"interval": certified["accuracy"]}
        assert attacked["accuracy"] - certified["accuracy"] == pytest.approx(certified["undecided"], abs=1e-5)
        assert attacked["attacks"]["pgd-strong"]["restarts"] == 5
        assert len(document["decided_by"]) == 80
        assert [stage["stage"] for stage in document["stages"]] == ["clean", "interval", "pgd-strong"]
        for stage in document["stages"]:
            assert document["decided_by"].count(stage["stage"]) == stage["decided"]
        for share in (certified["accuracy"], attacked["accuracy"], certified["undecided"]):
            assert f"{share:.2%}" in text
        for words in ("certified, under every attack: at least", "attacked, by pgd-strong: at most", "by stage"):
            assert words in text
        assert "interval: " in text
        assert not list(here.glob("done.json.*"))

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
        printed, errors = victim.communicate(timeout=60)
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

    def test_autoattack_may_be_added(self, here, monkeypatch):
        """Its stage is the last, so that the verdicts of the stages before stand."""
        monkeypatch.setattr("atmc.evaluation.autoattack.QUERIES", 50)
        assert run_verify("a.atmc", *self.ASKED, "added.json", "--autoattack") == 0
        whole = figures("added.json")
        calls = self.interrupt(monkeypatch, "run_protocol", 0)
        assert run_verify("a.atmc", *self.ASKED, "later.json") == 1
        assert run_verify("a.atmc", *self.ASKED, "later.json", "--autoattack", "--resume") == 0
        assert len(calls) > 2
        later = figures("later.json")
        assert {**later, "request": 0} == {**whole, "request": 0}
        assert whole["attacked"]["attacks"].keys() == {"pgd-strong", "autoattack"}

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
        assert "not finite" in expect_refusal(capsys, "nan.pt")
        without_model = ["verify", "nan.pt", "--data", "digits", "--threat", "linf:0.1"]
        assert "name their model with --model" in command_line.expect_refusal(capsys, *without_model)
