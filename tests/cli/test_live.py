"""The live line and the lines that stay, in a terminal and without one."""

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from atmc.cli.inspect import inspection_table
from atmc.cli.live import HEADING, LiveLine
from atmc.commands.evaluate import FileStarted
from atmc.commands.run import Message
from atmc.compress.admm import Admm
from atmc.compress.constraints import Codebook
from atmc.data import Images
from atmc.evaluation.accuracy import BatchAttacked
from atmc.evaluation.verdicts import Verdicts
from atmc.evaluation.verify.verify import BatchVerified
from atmc.pack import artifact
from atmc.pack.inspect import inspect_file
from atmc.training.loop import StepDone
from atmc.training.runner import EpochDone, Record, State


def record(**changes) -> Record:
    values = {
        "loss": 0.5,
        "clean": 0.9,
        "robust": 0.6,
        "clean_n": 143,
        "robust_n": 100,
        "nonzeros": 1234,
        "nominal_bits": 99,
        "file_bytes": None,
        "seconds": 2.0,
    }
    return Record(**{"phase": "admm", "epoch": 3, "primal": 0.25, "dual": 0.125, **values, **changes})


def step_done(**changes) -> StepDone:
    return StepDone(**{"step": 5, "steps": 5, "loss": 0.75, "seconds": 1.0, "admm": None, **changes})


def shown(*events: object, terminal: bool, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    with LiveLine(console) as line:
        for event in events:
            line.show(event)
    return console.file.getvalue()


def test_the_line_of_an_epoch_holds_every_figure():
    lines = shown(Message("reading digits"), EpochDone(record(), State()), terminal=False).splitlines()
    assert lines[:2] == ["reading digits", HEADING]
    assert lines[2].split() == ["admm", "3", "0.5000", "90.00%", "60.00%", "1,234", "0.25", "/", "0.12", "2.0", "s"]
    start = shown(EpochDone(record(epoch=0, loss=None, primal=None, dual=None), State()), terminal=False)
    assert start.splitlines()[1].split() == ["admm", "0", "-", "90.00%", "60.00%", "1,234", "-", "2.0", "s"]


def test_each_phase_has_its_heading():
    events = [EpochDone(record(phase=phase), State()) for phase in ("dense", "dense", "l0", "l0", "l0", "admm")]
    words = [line.split()[0] for line in shown(*events, terminal=False).splitlines()]
    assert words == ["phase", "dense", "dense", "phase", "l0", "l0", "l0", "phase", "admm"]


def test_the_live_line_tells_phase_loss_accuracy_and_time_left():
    progress = step_done(epoch=2, epochs=8, phase="l0", fraction=0.4)
    text = shown(EpochDone(record(), State()), progress, terminal=True)
    for part in ("l0 2/8", "loss 0.7500", "clean 90.0%", "robust 60.0%", ":"):
        assert part in text
    assert "l0 2/8" not in shown(progress, terminal=False)


LARGE = {"loss": 123.45678, "clean": 1.0, "robust": 1.0, "nonzeros": 21_265_088, "seconds": 1234.5}


@pytest.mark.parametrize(
    ("width", "epochs", "figures"),
    [
        (80, "10/20", ["loss 2.346", "clean 97.5%", "robust 85.0%", "res 0.00012/4.6e-05"]),
        (80, "1000/2000", ["loss 2.346", "clean 97.5%", "robust 85.0%"]),  # the residuals are cut, and nothing else
        (120, "10/20", ["loss 2.3457", "clean 97.5%", "robust 85.0%", "residuals 0.00012/4.6e-05"]),
    ],
)
def test_nothing_wraps_or_is_cut(width, epochs, figures):
    """Wide figures in a terminal of 80 columns."""
    admm = Admm(Codebook(8), primal=0.000123456, dual=0.0000456789)
    epoch, of = map(int, epochs.split("/"))
    progress = step_done(epoch=epoch, epochs=of, loss=2.345678, admm=admm, phase="admm", fraction=0.4)
    events = [
        Message("training on 45,000 images, validating on 4,000 of 5,000, under attack on 1,000"),
        EpochDone(record(epoch=200, primal=0.000123456, dual=0.0000456789, **LARGE), State()),
        EpochDone(record(clean=0.975, robust=0.85), State()),
        progress,
    ]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(*events, terminal=True, width=width))
    lines = re.split(r"[\r\n]+", text)
    assert max(map(len, lines)) <= width
    live = next(line for line in lines if f"admm {epochs}" in line)
    for part in figures:
        assert part in live
    assert re.search(r"-:--:--|\d:\d\d:\d\d", live)


def test_a_message_takes_the_phase_off_the_live_line():
    progress = step_done(epoch=2, epochs=2, phase="tune", fraction=1.0)
    text = shown(progress, Message("evaluating the file on the test split"), terminal=True)
    assert "tune 2/2" not in text[text.index("evaluating") :]


@pytest.mark.parametrize(("width", "right"), [(80, "99.9% still right"), (120, "9,990 of 10,000 still right (99.9%)")])
def test_an_attack_fits_the_terminal(width, right):
    images = Images(torch.zeros(10_000, 1, 1, 1), torch.zeros(10_000, dtype=torch.int64))
    verdicts = Verdicts.fresh(images, 10_000, keep=False)
    verdicts.queue, verdicts.done = torch.arange(9_995), 9_995
    event = BatchAttacked("autoattack", "apgd-ce", 9_990, 10_000, verdicts)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(event, terminal=True, width=width))
    assert max(map(len, re.split(r"[\r\n]+", text))) <= width
    assert f"autoattack, apgd-ce: 9,995 of 9,995; {right}" in text


@pytest.mark.parametrize(
    ("width", "verdicts"),
    [
        (80, "pgd-strong: 40.0% certified, 59.0% broken"),
        (120, "9,995 of 9,995; 4,000 certified, 5,900 broken of 10,000"),
    ],
)
def test_a_verification_fits_the_terminal(width, verdicts):
    event = BatchVerified(stage="pgd-strong", done=9_995, total=9_995, certified=4_000, broken=5_900, n=10_000)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(event, terminal=True, width=width))
    assert max(map(len, re.split(r"[\r\n]+", text))) <= width
    assert verdicts in text
    assert shown(event, terminal=False).count("pgd-strong") == 1
    assert shown(BatchVerified(**{**vars(event), "done": 100}), terminal=False) == ""


def test_without_a_terminal_each_stage_has_a_line():
    images = Images(torch.zeros(9, 1, 1, 1), torch.zeros(9, dtype=torch.int64))
    verdicts = Verdicts.fresh(images, 9, keep=False)
    verdicts.queue, verdicts.done = torch.arange(8), 4
    events = [BatchAttacked("autoattack", stage, 6, 9, verdicts) for stage in ("apgd-ce", "apgd-ce", "square")]
    lines = shown(FileStarted(Path("[b].atmc"), 2, 3), *events, terminal=False).splitlines()
    assert lines == [
        "[b].atmc (2 of 3)",
        "autoattack, apgd-ce: 4 of 8; 6 of 9 still right (66.7%)",
        "autoattack, square: 4 of 8; 6 of 9 still right (66.7%)",
    ]


def test_the_inspection_table_shows_every_tensor(lenet, tmp_path):
    artifact.save(lenet, tmp_path / "m.atmc")
    for width in (150, 80):
        console = Console(file=io.StringIO(), width=width)
        console.print(inspection_table(inspect_file(tmp_path / "m.atmc"), narrow=width < 110))
        text = console.file.getvalue()
        for name in ("conv1.weight", "fc2.bias", "500×800", "all tensors", "metadata, CRCs"):
            assert name in text
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
