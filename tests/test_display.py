"""What a person sees while a run goes on."""

import io

from rich.console import Console

from atmc.experiment.display import Display, inspection_table
from atmc.experiment.run import Stage
from atmc.pack import artifact
from atmc.pack.inspect import inspection
from atmc.phases import EpochEnd, Record, State
from atmc.train import Progress


def record(**changes) -> Record:
    values = {
        "loss": 0.5,
        "clean": 0.9,
        "robust": 0.6,
        "clean_n": 143,
        "robust_n": 100,
        "nonzeros": 1234,
        "nominal_bits": 99,
        "seconds": 2.0,
    }
    return Record(**{"phase": "admm", "epoch": 3, "primal": 0.25, "dual": 0.125, **values, **changes})


def shown(*events: object, terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system=None)
    with Display(console) as display:
        for event in events:
            display.show(event)
        display._bar.refresh()
    return console.file.getvalue()


def test_a_line_an_epoch_holds_every_figure():
    text = shown(Stage("reading digits"), EpochEnd(record(), State()), terminal=False)
    assert "reading digits" in text
    for part in ("admm   3", "0.5000", "90.00%", "60.00%", "1,234", "0.25 / 0.125", "2.0 s"):
        assert part in text
    start = shown(EpochEnd(record(epoch=0, loss=None, primal=None, dual=None), State()), terminal=False)
    assert "loss       -" in start
    assert "residuals" not in start


def test_the_live_line_tells_phase_loss_accuracy_and_time_left():
    progress = Progress(2, 8, 5, 5, 0.75, 1.0, None, phase="l0", share=0.4)
    text = shown(EpochEnd(record(), State()), progress, terminal=True)
    for part in ("l0 2/8", "loss 0.7500", "clean 90.0%", "robust 60.0%", ":"):
        assert part in text
    assert "l0 2/8" not in shown(progress, terminal=False)


def test_the_inspection_table_shows_every_tensor(lenet, tmp_path):
    artifact.save(lenet, tmp_path / "m.atmc")
    console = Console(file=io.StringIO(), width=150)
    console.print(inspection_table(inspection(tmp_path / "m.atmc")))
    text = console.file.getvalue()
    for name in ("conv1.weight", "fc2.bias", "500×800", "all tensors", "metadata, checksum"):
        assert name in text
