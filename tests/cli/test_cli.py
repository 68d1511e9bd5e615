"""The command line: what it prints and writes, and its exit status (0 done, 2 wrong input, 1 anything else)."""

import fcntl
import json
import os
import pkgutil
import re
import runpy
import shutil
import signal
import sys

import pytest
import torch
from command_line import call, expect_refusal
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import atmc
from atmc.commands import config
from atmc.commands.run import run
from atmc.core import files
from atmc.evaluation import evaluate
from atmc.training import settings
from atmc.training.loop import TrainingDiverged
from atmc.training.runner import EpochDone

MODELS = '''
from torch import nn

def build(num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes))

def seven(num_classes):
    return build(7)

def failing(num_classes):
    return build(num_classes, width=4)

def probabilities(num_classes):
    return nn.Sequential(build(num_classes), nn.Softmax(1))

class Viewing(nn.Module):
    """Flattens by view, as many models do."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Conv2d(1, 4, 5, stride=3)
        self.head = nn.Linear(256, num_classes)

    def forward(self, x):
        x = self.body(x).relu()
        return self.head(x.view(x.size(0), -1))

class Picky(nn.Module):
    """Asserts the size of its images, as vision transformers do."""

    def __init__(self, num_classes):
        super().__init__()
        self.net = build(num_classes)

    def forward(self, x):
        assert x.shape[-1] == 32, "expected 32x32 images"
        return self.net(x)

class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self, num_classes):
        super().__init__()
        self.one, self.two = nn.Linear(784, 784), nn.Linear(784, 784)
        self.two.weight = self.one.weight
        self.head = nn.Linear(784, num_classes)

    def forward(self, x):
        return self.head(self.two(self.one(x.flatten(1)).relu()).relu())
'''
CONFIG = """
model = "cli_models:build"
data = "digits"
threat = "linf:0.1"
ratio = 0.3
bits = 3
precision = "fp32"
threads = 1
eval_n = 20
checks = false
limit = 60

[training]
objective = "mixed"
epochs = 1
attack_steps = 1
val_n = 10
batch_size = 30
"""


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """Make a current folder with models to import and a configuration, run.toml."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "cli_models.py").write_text(MODELS)
    (folder / "run.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    sys.modules.pop("cli_models", None)


@pytest.fixture(scope="module")
def done(here):
    """Make a finished run folder."""
    assert call("compress", "--config", "run.toml", "--out", here / "done") == 0
    return here / "done"


@pytest.fixture
def small():
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


class TestStatus0:
    def test_version(self, capsys):
        assert call("--version") == 0
        assert capsys.readouterr().out == f"atmc {atmc.__version__}\n"

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--help"], ["compress", "evaluate", "inspect"]),
            (["compress", "--help"], ["--model", "--threat", "--ratio", "--bits", "--resume", "--overwrite"]),
            (["compress", "--help"], ["resnet18", "al0q", "trades:beta=6", "mart:weight=5", "pgd-strong"]),
            (["evaluate", "--help"], ["--attack", "--after", "--json", "--overwrite", "autoattack", "margin"]),
            (["inspect", "--help"], ["--json"]),
        ],
    )
    def test_help(self, capsys, arguments, words):
        assert call(*arguments) == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words)

    def test_compress_by_options_alone(self, tmp_path, capsys):
        out = tmp_path / "out"
        options = "--model cli_models:build --data digits --threat linf:0.1 --ratio 0.3 --bits 2 --epochs dense=1,l0=1"
        options += ",admm=1,tune=0 --objective natural --attack fgsm,pgd --eval-n 10 --limit 60 --seed 3 --threads 1"
        assert call("compress", *options.split(), "--precision", "fp32", "--device", "cpu", "--out", out) == 0
        output = capsys.readouterr()
        assert output.err == ""
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["bits"] == 2
        assert metrics["seed"] == 3
        assert set(metrics["attacks"]) == {"fgsm", "pgd"}
        assert metrics["attacks"]["pgd"]["n"] == 10
        assert f"{metrics['file_bytes']:,} bytes" in output.out
        assert str(out / "model.atmc") in output.out
        assert str(out / "report.html") in output.out
        assert [line.split()[0] for line in output.out.splitlines() if line.endswith(" s")] == ["dense", "l0", "admm"]

    def test_an_objective_with_its_options(self, tmp_path):
        """An objective on the command line replaces that of the file together with its options."""
        text = CONFIG.replace('"mixed"', '"mart"')
        (tmp_path / "run.toml").write_text(f"{text}objective_options = {{ weight = 2.0 }}\n")
        command = ["compress", "--config", tmp_path / "run.toml", "--epochs", 0]
        for text, options in (("trades:beta=3", {"beta": 3.0}), ("mart", {"weight": 5.0}), (None, {"weight": 2.0})):
            out = tmp_path / f"out-{text}"
            assert call(*command, "--out", out, *(["--objective", text] if text else [])) == 0
            assert config.read_toml(out / "config.toml")["training"]["objective_options"] == options

    def test_proofs_and_the_reason_of_the_objective_are_shown(self, tmp_path, capsys, monkeypatch):
        """The table ends with [certified, attacked], literally."""
        monkeypatch.setattr(settings, "FEWEST_STEPS", 1)
        (tmp_path / "run.toml").write_text(CONFIG.replace('objective = "mixed"', ""))
        command = ["compress", "--config", tmp_path / "run.toml", "--out", tmp_path / "out", "--epochs", "dense=1,l0=0"]
        assert call(*command, "--eval-n", 7) == 0
        text = capsys.readouterr().out
        assert "objective: ibp, the default for linf:0.1, because" in text
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        certified, attacked = metrics["certified"], metrics["attacked"]
        assert certified["n"] == attacked["n"] == 7
        bounds = f"[{certified['accuracy']:.2%}, {attacked['accuracy']:.2%}] of 7"
        assert re.search(rf"\[certified, attacked\] .* {re.escape(bounds)} ", text)
        shutil.rmtree(tmp_path / "out")
        assert call(*command, "--eval-n", 7, "--no-verify") == 0
        assert "certified, attacked" not in capsys.readouterr().out

    def test_a_model_that_does_not_normalize(self, tmp_path, capsys):
        options = "--model lenet --data digits --threat linf:0.1 --ratio 0.01 --epochs 0 --limit 50 --val-n 10"
        command = [
            "compress",
            *options.split(),
            "--eval-n",
            5,
            "--no-checks",
            "--no-normalize",
            "--out",
            tmp_path / "out",
        ]
        assert call(*command, "--out", tmp_path / "out") == 0
        assert config.read_toml(tmp_path / "out" / "config.toml")["normalize"] is False
        assert call("inspect", tmp_path / "out" / "model.atmc", "--json") == 0
        assert '"mean": null' in capsys.readouterr().out

    def test_options_go_before_the_configuration(self, tmp_path, capsys):
        out = tmp_path / "out"
        options = ["--seed", 9, "--epochs", 0, "--limit", 50, "--val-n", 13]
        assert call("compress", "--config", "run.toml", "--out", out, *options) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        assert [metrics["validation"][name]["n"] for name in ("clean", "quick")] == [13, 13]
        assert metrics["seed"] == 9
        assert "limit = 50" in (out / "config.toml").read_text()

    def test_a_finished_run_is_shown_again(self, done, capsys):
        before = (done / "model.atmc").read_bytes()
        assert call("compress", "--out", done, "--resume") == 0
        text = capsys.readouterr().out
        assert f"{len(before):,} bytes" in text
        assert "loss" not in text
        assert (done / "model.atmc").read_bytes() == before

    def test_evaluate_writes_json_once(self, done, tmp_path, capsys):
        path = tmp_path / "figures.json"
        command = ["evaluate", done / "model.atmc", "--data", "digits", "--threat", "linf:0.1", "--n", "20"]
        command += ["--attack", "pgd,fgsm", "--model", "cli_models:build", "--json", path]
        assert call(*command) == 0
        text = capsys.readouterr().out
        figures = json.loads(path.read_text())
        metrics = json.loads((done / "metrics.json").read_text())
        assert figures["clean"] == metrics["clean"]
        assert figures["attacks"]["pgd"] == metrics["attacks"]["pgd"]
        assert figures["threat"] == "linf:0.1"
        assert f"{figures['clean']['accuracy']:.2%}" in text
        path.write_text("mine")
        assert "exists: add --overwrite" in expect_refusal(capsys, *command)
        assert path.read_text() == "mine"
        assert call(*command, "--overwrite") == 0
        assert {**json.loads(path.read_text()), "seconds": 0} == {**figures, "seconds": 0}

    def test_inspect(self, done, capsys):
        capsys.readouterr()
        assert call("inspect", done / "model.atmc", "--json") == 0
        contents = json.loads(capsys.readouterr().out)
        assert contents["file_bytes"] == (done / "model.atmc").stat().st_size
        assert contents["metadata"]["model"]["name"] == "cli_models:build"
        parts = contents["totals"]
        counted = sum(parts[name] for name in ("header", "positions", "codebook", "codes"))
        assert counted + parts["metadata and checksums"] == pytest.approx(contents["file_bytes"], abs=0.01)
        assert call("inspect", done / "model.atmc") == 0
        table = capsys.readouterr().out
        assert f"{contents['file_bytes']:,} bytes" in table
        assert all(row["name"] in table for row in contents["tensors"])

    @pytest.mark.parametrize("name", ["[red]model.atmc", "a[/b].atmc"])
    def test_names_with_brackets_are_only_names(self, done, tmp_path, capsys, monkeypatch, name):
        """Square brackets are markup for rich, which prints."""
        monkeypatch.chdir(tmp_path)
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((done / "model.atmc").read_bytes())
        capsys.readouterr()
        assert call("inspect", name) == 0
        assert name in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("model", "exclude"), [("Viewing", []), ("Tied", ["one.weight", "two.weight"])], ids=["view", "tied"]
    )
    def test_models_as_people_write_them(self, tmp_path, capsys, model, exclude):
        (tmp_path / "run.toml").write_text(f"{CONFIG}exclude = {json.dumps(exclude)}\n")
        options = ["--config", tmp_path / "run.toml", "--model", f"cli_models:{model}", "--out", tmp_path / "out"]
        assert call("compress", *options) == 0
        assert (tmp_path / "out" / "model.atmc").exists()


class TestStatus2:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--threat 0.1", "expected a threat like"),
            ("--threat l3:0.1", "unknown norm 'l3'"),
            ("--threat linf:", "expected a radius"),
            ("--threat linf:8/0", "expected a radius"),
            ("--threat linf:0", "finite eps > 0"),
            ("--threat linf:-0.1", "finite eps > 0"),
            ("--threat linf:nan", "finite eps > 0"),
            ("--threat l2:inf", "finite eps > 0"),
            ("--threat linf:8", "above the largest linf distance in"),
            ("--threat l2:28.1", "28 for images of 784 values"),
            ("--threat l1:785", "784 for images of 784 values"),
            ("--ratio 1.5", "a ratio > 0 and <= 1, got 1.5"),
            ("--ratio 0", "a ratio > 0 and <= 1, got 0"),
            ("--ratio nan", "finite number"),
            ("--ratio 0.0005", "below the floor of this model and method, 2"),
            ("--nonzeros 5 --ratio 0.1", "exactly one of ratio, nonzeros and max_bytes"),
            ("--bits 9", "bits >= 1 and <= 8"),
            ("--bits 0", "bits >= 1 and <= 8"),
            ("--model lenett", "did you mean 'lenet'"),
            ("--model cli_models:bild", "did you mean 'build'"),
            ("--model no_such_module:build", "cannot import 'no_such_module'"),
            ("--data digit", "did you mean digits"),
            ("--method amtc", "did you mean 'atmc'"),
            ("--method al0", "has no codebook"),
            ("--attack pdg", "did you mean 'pgd'"),
            ("--objective mix", "'mixed'"),
            ("--precision fp8", "precision"),
            ("--epochs many", "expected --epochs 20 or --epochs dense=20"),
            ("--epochs 1.5", "expected --epochs 20 or --epochs dense=20"),
            ("--epochs dense=x", "expected --epochs 20 or --epochs dense=20"),
            ("--epochs dense=-1", "expected epochs >= 0"),
            ("--seed -1", "seed"),
            ("--seed 9223372036854775808", "seed: Input should be less than or equal to 9223372036854775807"),
            ("--seed 99999999999999999999", "seed"),
            ("--limit 0", "limit"),
            ("--eval-n 0", "eval_n"),
            ("--val-n 0", "training.val_n"),
            ("--threads 0", "threads"),
            ("--threads 1000000", "threads"),
            ("--threads 99999999999999999999", "threads"),
            ("--checkpoint nowhere.pt", "nowhere.pt does not exist"),
            ("--config nowhere.toml", "cannot read nowhere.toml"),
            ("--model cli_models:seven", "the model has 7 outputs, the data 10 classes"),
            ("--model cli_models:failing", "cli_models:failing failed for num_classes=10: TypeError: build() got"),
            ("--model cli_models:probabilities", "look like probabilities"),
            ("--model cli_models:Picky", "expected 32x32 images"),
            ("--model cli_models:Tied", "share one weight"),
        ],
    )
    def test_compress(self, tmp_path, capsys, options, message):
        out = tmp_path / "out"
        assert message in expect_refusal(capsys, "compress", "--config", "run.toml", "--out", out, *options.split(" "))
        assert not out.exists()

    def test_a_phase_that_is_not(self, tmp_path, capsys):
        options = ["--config", "run.toml", "--out", tmp_path / "out", "--epochs", "dens=1"]
        message = expect_refusal(capsys, "compress", *options)
        assert "'dense'" in message
        assert "literal[" not in message  # the checking library's own words

    def test_a_budget_larger_than_the_model(self, tmp_path, capsys):
        (tmp_path / "run.toml").write_text(CONFIG.replace("ratio = 0.3", "nonzeros = 3000"))
        options = ["--config", tmp_path / "run.toml", "--out", tmp_path / "out"]
        assert "larger than the model: 2,660 weights" in expect_refusal(capsys, "compress", *options)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("stepz = 3", "unknown key 'training.stepz'"),
            ("batch_sise = 3", "did you mean 'batch_size'"),
            ("regrow = inf", "regrow"),
            ("learning_rate = nan", "learning_rate"),
            ("learning_rate = ", "is not a TOML file"),
            ("seed = 9223372036854775808", "unknown key 'training.seed'"),
        ],
    )
    def test_configurations(self, tmp_path, capsys, line, message):
        (tmp_path / "bad.toml").write_text(f"{CONFIG}{line}\n")
        options = ["--config", tmp_path / "bad.toml", "--out", tmp_path / "out"]
        assert message in expect_refusal(capsys, "compress", *options)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "arguments",
        [
            ["comprss"],
            ["compress", "--config", "run.toml"],
            ["compress", "--config", "run.toml", "--out", "x", "--bits", "four"],
            ["compress", "--config", "run.toml", "--out", "x", "--thread", "linf:0.1"],
            ["evaluate", "x.atmc", "--data", "digits"],
            ["inspect"],
        ],
        ids=["command", "no out", "no number", "option", "no threat", "no file"],
    )
    def test_usage(self, capsys, arguments):
        expect_refusal(capsys, *arguments)

    def test_cuda_asked_for_and_absent(self, done, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        options = ["--config", "run.toml", "--out", tmp_path / "out", "--device", "cuda"]
        assert "no CUDA device" in expect_refusal(capsys, "compress", *options)
        options = [done / "model.atmc", "--data", "digits", "--threat", "linf:0.1", "--model", "cli_models:build"]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert "no such CUDA device here" in expect_refusal(capsys, "evaluate", *options, "--device", "cuda")
        assert "expected a device such as" in expect_refusal(capsys, "evaluate", *options, "--device", "gpu")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "does not begin with ATMC"),
            (b"PK\3\4", "does not begin with ATMC"),
            (slice(0, 20), "is cut off"),
            (slice(0, -100), "is cut off or damaged"),
            (slice(1, None), "does not begin with ATMC"),
            (None, "No such file"),
        ],
    )
    def test_files_that_are_no_model(self, done, tmp_path, capsys, content, message):
        path = tmp_path / "bad.atmc"
        whole = (done / "model.atmc").read_bytes()
        if content is not None:
            path.write_bytes(whole[content] if isinstance(content, slice) else content)
        assert message in expect_refusal(capsys, "inspect", path)
        assert message in expect_refusal(capsys, "evaluate", path, "--data", "digits", "--threat", "linf:0.1")
        if content is not None:
            options = ["--config", "run.toml", "--out", tmp_path / "out", "--checkpoint", path]
            assert message in expect_refusal(capsys, "compress", *options)
            assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"", "empty"),
            (b"rubbish", "damaged or"),
            ("half", "damaged or"),
            ("of another model", "of another model: 4 of the model's 4 tensors are not there: 0.weight"),
        ],
    )
    def test_checkpoints(self, tmp_path, capsys, small, name, content, expected):
        state = small.state_dict() if content == "half" else {"head": torch.zeros(3)}
        (save_file if name == "a.safetensors" else torch.save)(state, tmp_path / name)
        if content == "half":
            content = (tmp_path / name).read_bytes()[: (tmp_path / name).stat().st_size // 2]
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        options = ["--config", "run.toml", "--out", tmp_path / "out", "--checkpoint", tmp_path / name]
        message = expect_refusal(capsys, "compress", *options)
        assert f"checkpoint {tmp_path / name} is {expected}" in message
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("size", "mode"), [(32, "L"), (28, "RGB")])
    def test_images_that_do_not_fit_the_model(self, done, tmp_path, capsys, size, mode):
        for split in ("train", "test"):
            for label in range(10):
                (tmp_path / "data" / split / str(label)).mkdir(parents=True)
                for number in range(2):
                    Image.new(mode, (size, size)).save(tmp_path / "data" / split / str(label) / f"{number}.png")
        shape = f"does not take images of shape ({3 if mode == 'RGB' else 1}, {size}, {size})"
        options = ["--data", tmp_path / "data", "--model", "cli_models:build"]
        assert shape in expect_refusal(capsys, "evaluate", done / "model.atmc", *options, "--threat", "linf:0.1")
        options += ["--config", "run.toml", "--out", tmp_path / "out"]
        assert shape in expect_refusal(capsys, "compress", *options)
        assert not (tmp_path / "out").exists()

    def test_a_folder_where_a_file_is_meant(self, done, capsys):
        assert str(done) in expect_refusal(capsys, "inspect", done)
        assert str(done) in expect_refusal(capsys, "evaluate", done, "--data", "digits", "--threat", "linf:0.1")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--threat linf:8", "above the largest"),
            ("--threat linf:0.1 --attack pdg", "did you mean 'pgd'"),
            ("--threat linf:0.1 --n 0", "n >= 1"),
            ("--threat linf:0.1 --steps 0", "steps >= 1"),
            ("--threat linf:0.1 --seed -1", "expected a seed from 0 to 2^63 - 1, got -1"),
            ("--threat linf:0.1 --seed 9223372036854775808", "expected a seed from 0 to 2^63 - 1"),
            (
                "--threat linf:0.1 --model cli_models:seven",
                "tensor 3.weight has shape (10, 256), the model's is (7, 256); cli_models:seven",
            ),
            (
                "--threat linf:0.1 --model cli_models:probabilities",
                "cli_models:probabilities is not its factory, which was 'cli_models:build'",
            ),
            (
                "--threat linf:0.1 --model cli_models:failing",
                "model.atmc cannot be loaded: the factory cli_models:failing",
            ),
            ("--threat linf:0.1 --data digit", "did you mean digits"),
        ],
    )
    def test_evaluate(self, done, capsys, options, message):
        command = ["evaluate", done / "model.atmc", "--data", "digits", "--model", "cli_models:build"]
        assert message in expect_refusal(capsys, *command, *options.split())

    def test_evaluate_needs_the_factory(self, done, capsys):
        options = ["--data", "digits", "--threat", "linf:0.1"]
        assert "'cli_models:build'" in expect_refusal(capsys, "evaluate", done / "model.atmc", *options)

    @pytest.mark.parametrize("options", [["--attack", "pgd,pdg"], ["--json", "nowhere/figures.json"]])
    def test_evaluate_checks_before_it_attacks(self, done, capsys, monkeypatch, options):
        def attacked(*_, **__):
            raise AssertionError("attacked first")

        monkeypatch.setattr(evaluate, "run_protocol", attacked)
        command = ["evaluate", done / "model.atmc", "--data", "digits", "--threat", "linf:0.1"]
        expect_refusal(capsys, *command, "--model", "cli_models:build", *options)


class TestFolders:
    def test_an_existing_run_is_left_as_it_is(self, done, capsys):
        before = {path.name: path.read_bytes() for path in done.iterdir()}
        command = ["compress", "--config", "run.toml", "--out", done]
        assert "add --resume to continue it or --overwrite" in expect_refusal(capsys, *command)
        assert "seed was 0, is 4" in expect_refusal(capsys, *command, "--resume", "--seed", 4)
        assert {path.name: path.read_bytes() for path in done.iterdir()} == before

    def test_a_folder_in_use(self, tmp_path, capsys):
        with open(tmp_path / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            command = ["compress", "--config", "run.toml", "--out", tmp_path]
            assert "in use by another run" in expect_refusal(capsys, *command)

    @pytest.mark.parametrize("option", [None, "--resume", "--overwrite"])
    def test_a_folder_of_something_else(self, tmp_path, capsys, option):
        (tmp_path / "checkpoint").mkdir()
        (tmp_path / "checkpoint" / "epoch90.pt").write_text("years of work")
        (tmp_path / "metrics.json").write_text("mine")
        command = ["compress", "--config", "run.toml", "--out", tmp_path, *([option] if option else [])]
        assert "holds no run" in expect_refusal(capsys, *command)
        assert (tmp_path / "checkpoint" / "epoch90.pt").read_text() == "years of work"
        assert (tmp_path / "metrics.json").read_text() == "mine"

    def test_a_path_that_cannot_be_a_folder(self, tmp_path, capsys):
        (tmp_path / "file").write_text("mine")
        command = ["compress", "--config", "run.toml", "--out"]
        assert "is a file" in expect_refusal(capsys, *command, tmp_path / "file")
        assert "file" in expect_refusal(capsys, *command, tmp_path / "file" / "below")

    def test_resume_needs_a_run(self, tmp_path, capsys):
        expect_refusal(capsys, "compress", "--out", tmp_path / "nowhere", "--resume")
        assert not (tmp_path / "nowhere").exists()

    @pytest.mark.parametrize("content", [b"", b"\x80\x02rubbish", b"PK\x03\x04rubbish", None], ids=str)
    def test_a_damaged_checkpoint_of_its_own(self, tmp_path, capsys, content):
        out = tmp_path / "out"
        for event in run(config.parse(config.read_toml("run.toml")), out):
            if isinstance(event, EpochDone):
                break
        state = out / "checkpoint" / "state.pt"
        state.write_bytes(state.read_bytes()[: state.stat().st_size // 2] if content is None else content)
        assert "state.pt" in expect_refusal(capsys, "compress", "--out", out, "--resume")


class TestStatus1:
    """Exit status 1: the cause is not the user's input."""

    @pytest.mark.parametrize("name", ["config.toml", "state.pt", "model.atmc", "report.html", "metrics.json"])
    def test_a_full_disk(self, done, tmp_path, capsys, monkeypatch, name):
        """The disk is full from the first time that this file is written after the first checkpoint."""
        out = tmp_path / "a run"
        replace = os.replace

        def full(source, target):
            if target.name == name and (name != "state.pt" or target.exists()):
                raise OSError(28, os.strerror(28), str(source), None, str(target))
            replace(source, target)

        command = ["compress", "--config", "run.toml", "--out", out]
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", full)
            message = expect_refusal(capsys, *command, status=1)
        assert re.fullmatch(f"atmc: .*{name}: No space left on device", message)
        assert not list(out.rglob("*.tmp"))
        assert not (out / name).exists()
        if name == "config.toml":
            assert call(*command) == 0
        else:
            assert (out / "checkpoint" / "state.pt").exists()
            assert call("compress", "--out", out, "--resume") == 0
        assert (out / "model.atmc").read_bytes() == (done / "model.atmc").read_bytes()

    def test_a_full_disk_for_the_log(self, tmp_path, capsys, monkeypatch):
        def open_full(path, *arguments, **options):
            return original("/dev/full" if str(path).endswith("log.jsonl") else path, *arguments, **options)

        original = open
        monkeypatch.setattr("builtins.open", open_full)
        message = expect_refusal(capsys, "compress", "--config", "run.toml", "--out", tmp_path / "out", status=1)
        assert message.endswith("log.jsonl: No space left on device")

    def test_a_full_disk_says_how_to_continue(self, tmp_path, capsys, monkeypatch):
        def full(*_):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr("atmc.commands.run.append_line", full)
        assert call("compress", "--config", "run.toml", "--out", tmp_path / "a run") == 1
        assert f"continue with: atmc compress --out '{tmp_path / 'a run'}' --resume" in capsys.readouterr().out

    def test_training_that_diverged(self, tmp_path, capsys, monkeypatch):
        def diverging(*_, **__):
            yield from ()
            raise TrainingDiverged("the loss became nan in epoch 3; try a lower learning rate")

        monkeypatch.setattr("atmc.commands.run.run", diverging)
        assert "lower learning rate" in expect_refusal(
            capsys, "compress", "--config", "run.toml", "--out", tmp_path / "out", status=1
        )

    @pytest.mark.parametrize(
        ("place", "nth"),
        [
            ("atmc.commands.run.load_data", 1),
            ("atmc.core.files.os.replace", 1),  # config.toml
            ("atmc.training.loop.assign", 3),
            ("atmc.training.runner.clean_accuracy", 2),
            ("atmc.commands.run.append_line", 3),
            ("atmc.core.files.os.replace", 4),  # the third epoch's checkpoint
            ("atmc.training.job.artifact.to_bytes", 2),  # when the forms of the weights are chosen
            ("atmc.core.files.os.replace", 7),  # model.atmc
            ("atmc.evaluation.evaluate.run_protocol", 1),
            ("atmc.commands.run.write_report", 1),
            ("atmc.core.files.os.replace", 9),  # metrics.json
        ],
    )
    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    def test_interrupted(self, done, tmp_path, capsys, monkeypatch, place, nth, after):
        """SIGINT (Ctrl-C) just before or after one of these functions is called, in every part of a run."""
        out, calls, original = tmp_path / "out", [], pkgutil.resolve_name(place)

        def interrupting(*arguments, **options):
            calls.append(place)
            if len(calls) == nth and not after:
                signal.raise_signal(signal.SIGINT)
            result = original(*arguments, **options)
            if len(calls) == nth:
                signal.raise_signal(signal.SIGINT)
            return result

        command = ["compress", "--config", "run.toml", "--out", out]
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupting)
            assert call(*command) == 1
        output = capsys.readouterr()
        assert output.err == ""
        assert not [path for path in out.rglob(".*") if path.is_file()]  # neither a lock nor half a file
        hint = output.out.splitlines()[-1]
        if (out / "config.toml").exists():
            assert hint == f"interrupted; continue with: atmc compress --out {out} --resume"
            command = ["compress", "--out", out, "--resume"]
        else:
            assert hint == "interrupted; nothing was started: give the same command again"
        assert call(*command) == 0
        assert (out / "model.atmc").read_bytes() == (done / "model.atmc").read_bytes()
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (out, done)]
        assert {**metrics[0], "seconds": 0} == {**metrics[1], "seconds": 0}
        assert {path.name for path in out.iterdir()} == {path.name for path in done.iterdir()}

    def test_an_interrupted_overwrite_resumes_no_other_run(self, done, tmp_path, capsys, monkeypatch):
        """Until the data are read the old run is untouched, and --resume would continue the old run."""
        out = tmp_path / "out"
        shutil.copytree(done, out)
        command = ["compress", "--config", "run.toml", "--out", out, "--seed", 5, "--overwrite"]
        for place in ("load_data", "write_beside"):
            with monkeypatch.context() as patch:
                patch.setattr(f"atmc.commands.run.{place}", lambda *_, **__: signal.raise_signal(signal.SIGINT))
                assert call(*command) == 1
            assert "nothing was started: give the same command again" in capsys.readouterr().out
            assert (out / "model.atmc").exists() == (place == "load_data")
        assert call(*command) == 0

    def test_evaluate_interrupted(self, done, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(evaluate, "run_protocol", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        command = ["evaluate", done / "model.atmc", "--data", "digits", "--threat", "linf:0.1"]
        command += ["--model", "cli_models:build", "--json", tmp_path / "figures.json"]
        assert call(*command) == 1
        assert capsys.readouterr().err.split() == ["atmc:", "interrupted"]
        assert not (tmp_path / "figures.json").exists()


class TestPython:
    """Images from Python raise the same errors."""

    X, Y = torch.linspace(0, 1, 20 * 784).view(20, 1, 28, 28), torch.arange(20) % 10

    def compress(self, model: nn.Module, train: tuple, val: tuple | None = None, **options: object) -> None:
        settings = {"threat": atmc.Linf(0.1), "budget": atmc.Budget(ratio=0.3), "epochs": 1, **options}
        atmc.compress(model, train, val or (self.X, self.Y), **settings)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, y: (x * 255, y), r"expected pixels in \[0, 1\], found values from 0 to 255"),
            (lambda x, y: (x - 0.1, y), r"expected pixels in \[0, 1\]"),
            (lambda x, y: (x.where(x < 0.5, torch.nan), y), "not finite"),
            (lambda x, y: (x.where(x < 0.5, torch.inf), y), "not finite"),
            (lambda x, y: (x, y - 1), "expected labels >= 0, got -1"),
            (lambda x, y: (x, y + 5), "the model has 10 outputs"),
            (lambda x, y: (x, y.float()), "expected integer labels"),
            (lambda x, y: (x, y[:5]), "labels"),
            (lambda x, y: (x[..., :16, :16], y), r"does not take images of shape \(1, 16, 16\)"),
            (lambda x, y: (x.repeat(1, 3, 1, 1), y), r"does not take images of shape \(3, 28, 28\)"),
            (lambda x, y: (x.permute(0, 2, 3, 1), y), "channels before height and width"),
        ],
    )
    def test_images_and_labels(self, small, change, message):
        train = change(self.X, self.Y)
        with pytest.raises(ValueError, match=message):
            self.compress(small, train)
        with pytest.raises(ValueError, match=message):
            atmc.evaluate(small, train, threat=atmc.Linf(0.1))

    def test_validation_images_of_another_size(self, small):
        with pytest.raises(ValueError, match=r"\(1, 32, 32\)"):
            self.compress(small, (self.X, self.Y), (torch.zeros(20, 1, 32, 32), self.Y))

    def test_models(self, small):
        with pytest.raises(ValueError, match="look like probabilities"):
            self.compress(nn.Sequential(small, nn.Softmax(1)), (self.X, self.Y))
        with pytest.raises(ValueError, match=r"expected logits of shape \(8, classes\)"):
            self.compress(nn.Sequential(small, nn.Flatten(0)), (self.X, self.Y))
        with torch.no_grad():
            small[3].bias[0] = torch.nan
        with pytest.raises(ValueError, match="not finite numbers"):
            self.compress(small, (self.X, self.Y))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"threat": 0.1}, r"expected a threat such as Linf\(8 / 255\) or 'linf:8/255', got 0\.1"),
            ({"threat": "linf:2"}, "above the largest linf distance"),
            ({"budget": 0.1}, "expected a budget such as .*, got 0"),
            ({"budget": atmc.Budget(nonzeros=2661)}, "2,661 nonzeros is larger than the model: 2,660 weights"),
            ({"budget": atmc.Budget(nonzeros=1)}, "1 nonzeros is below the floor of this model and method, 2"),
            ({"device": "gpu"}, "expected a device such as .*, got 'gpu'"),
            ({"device": "cuda:7"}, "torch sees no such CUDA device here"),
            ({"device": torch.device("cuda")}, "torch sees no such CUDA device here"),
            ({"epochs": 1.5}, "expected epochs >= 0 in phase dense, got 1.5"),
            ({"epochs": {"dense": None}}, "expected epochs >= 0 in phase dense, got None"),
            ({"learning_rate": "high"}, "expected learning_rate >= 0 in phase dense, got 'high'"),
            ({"batch_size": 2.5}, "expected batch_size to be an integer, got 2.5"),
            ({"val_n": "all"}, "expected val_n to be an integer, got 'all'"),
            ({"seed": None}, "expected seed to be an integer, got None"),
            ({"factor_start": "pca"}, "unknown factor_start 'pca': expected one of sparse, identity, svd"),
        ],
    )
    def test_settings(self, small, monkeypatch, change, message):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(ValueError, match=message):
            self.compress(small, (self.X, self.Y), **change)

    def test_evaluate(self, small):
        for arguments, message in [
            (("lenet", (self.X, self.Y), {}), "expected a torch.nn.Module, such as .*, got 'lenet'"),
            ((small, (self.X, self.Y), {"threat": None}), "expected a threat such as"),
            ((small, (self.X, self.Y), {"n": {"pdg": 3}}), "did you mean 'pgd'"),
            ((small, (self.X, self.Y), {"n": 0}), "n >= 1"),
        ]:
            model, test, options = arguments
            with pytest.raises(ValueError, match=message):
                atmc.evaluate(model, test, **{"threat": atmc.Linf(0.1), **options})
        with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module"):
            self.compress("lenet", (self.X, self.Y))

    def test_a_last_class_that_no_image_has(self, small):
        """Labels of nine classes for a model with ten outputs are a small set of images, not a wrong model."""
        few = self.Y < 9
        images = (self.X[few], self.Y[few])
        self.compress(small, images, images, epochs=0)

    @pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
    def test_weights_with_a_parametrization(self, small, name):
        """A weight with another library's parametrization cannot be factored; the error names it."""
        getattr(nn.utils.parametrizations, name)(small[3])
        with pytest.raises(ValueError, match=r"3\.weight"):
            self.compress(small, (self.X, self.Y))

    def test_a_frozen_weight_is_no_failure(self, small):
        small[0].weight.requires_grad_(False)
        budget, epochs = atmc.Budget(ratio=0.3, bits=2), {"dense": 0, "l0": 0, "admm": 1, "tune": 0}
        self.compress(small, (self.X, self.Y), budget=budget, epochs=epochs, batch_size=5)


def test_the_module_is_the_command(capsys, monkeypatch):
    """``python -m atmc`` does what ``atmc`` does."""
    monkeypatch.setattr(sys, "argv", ["atmc", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("atmc", run_name="__main__")
    assert not stopped.value.code
    assert capsys.readouterr().out == f"atmc {atmc.__version__}\n"
