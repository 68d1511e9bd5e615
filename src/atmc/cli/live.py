"""The live line of a terminal: what training and evaluation report while they run."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from atmc.cli.terminal import NARROW
from atmc.commands.evaluate import FileStarted
from atmc.commands.partial_results import PartMeasured
from atmc.commands.run import Message
from atmc.evaluation.accuracy import BatchAttacked
from atmc.evaluation.checks import Check
from atmc.evaluation.verify.verify import BatchVerified
from atmc.training.loop import StepDone
from atmc.training.runner import EpochDone, Record

HEADING = "phase epoch    loss    clean   robust    nonzeros  primal / dual         time"
REFRESH = 0.2  # seconds between two updates of the live line


class _Clock(ProgressColumn):
    """The time that is left while a model trains, and the time that has passed otherwise."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(min_width=len("0:00:00")))
        self._remaining, self._elapsed = TimeRemainingColumn(), TimeElapsedColumn()

    def render(self, task: Task) -> Text:
        return (self._remaining if task.fields["training"] else self._elapsed).render(task)


class LiveLine:
    """Shows the events of commands: one live line, and lines that stay for epochs and stages; all fit 80 columns.

    If the output is no terminal there is no live line, and each stage of an attack gets a line that stays.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._narrow = console.width < NARROW
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=4 if self._narrow else 20),
            _Clock(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=1.0, note="", training=False)
        self._record: Record | None = None
        self._stage: tuple[str, str] | None = None
        self._updated = 0.0

    def __enter__(self) -> LiveLine:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the live line."""
        self._bar.stop()

    def show(self, event: object) -> None:
        """Show one event; events of other kinds are ignored."""
        match event:
            case Message():
                self._print(event.text, style="dim")
                self._bar.reset(self._task, description="", note="", training=False)
            case FileStarted():
                self._print(f"{event.file} ({event.position} of {event.total})", style="dim")
                self._bar.reset(self._task, description="starting", note="", training=False)
                self._stage = None
            case StepDone():
                self._show_step(event)
            case EpochDone():
                if self._record is None or self._record.phase != event.record.phase:
                    self._print(HEADING, style="dim")
                self._record = event.record
                self._print(epoch_line(event.record))
            case BatchAttacked():
                self._show_attack(event)
            case PartMeasured():
                self._show_part(event)
            case BatchVerified():
                self._show_verified(event)
            case Check():
                self._bar.update(self._task, description="checking", completed=1.0, note=event.name)

    def _print(self, text: str, *, style: str | None = None) -> None:
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _is_due(self) -> bool:
        """Return whether the live line may be updated again; if so, count it as updated now."""
        now = time.monotonic()
        due = now - self._updated >= REFRESH
        if due:
            self._updated = now
        return due

    def _show_step(self, event: StepDone) -> None:
        if not (self._is_due() or event.epoch_done):
            return
        notes = [f"loss {event.loss:.{3 if self._narrow else 4}f}"]
        if self._record is not None:
            notes += [f"clean {self._record.clean:.1%}", f"robust {self._record.robust:.1%}"]
        if event.admm is not None:
            residuals = f"{event.admm.primal:.2g}/{event.admm.dual:.2g}"
            notes.append(f"res {residuals}" if self._narrow else f"residuals {residuals}")
        note = (" " if self._narrow else "  ").join(notes)
        description = f"{event.phase} {event.epoch}/{event.epochs}"
        self._bar.update(self._task, description=description, completed=event.fraction, note=note, training=True)

    def _show_attack(self, event: BatchAttacked) -> None:
        stage = (event.attack, event.stage)
        begins, self._stage = stage != self._stage, stage
        if begins and not self._console.is_terminal:
            self._print(attack_line(event))
        if self._is_due() or begins:
            done = event.verdicts.done / max(1, len(event.verdicts.queue))
            note = attack_line(event, narrow=self._narrow)
            self._bar.update(self._task, description="attacking", completed=done, note=note)

    def _show_part(self, event: PartMeasured) -> None:
        line = f"{event.measurement}: {event.done:,} of {event.total:,}; {event.result}"
        self._bar.update(self._task, description="measuring", completed=event.done / event.total, note=line)
        if not self._console.is_terminal and (event.total <= 100 or not event.done % 100 or event.done == event.total):
            self._print(line)

    def _show_verified(self, event: BatchVerified) -> None:
        note = verify_line(event, narrow=self._narrow)
        self._bar.update(self._task, description="verifying", completed=event.done / event.total, note=note)
        if not self._console.is_terminal and event.done == event.total:
            self._print(verify_line(event))


def verify_line(event: BatchVerified, *, narrow: bool = False) -> str:
    """Return how far a stage of a verification has come.

    Such as 'interval: 200 of 938; 140 certified, 62 broken of 1,000'; narrow, at most 56 characters:
    'interval: 14.0% certified, 6.2% broken'.
    """
    if narrow:
        return f"{event.stage}: {event.certified / event.n:.1%} certified, {event.broken / event.n:.1%} broken"
    verdicts = f"{event.certified:,} certified, {event.broken:,} broken of {event.n:,}"
    return f"{event.stage}: {event.done:,} of {event.total:,}; {verdicts}"


def attack_line(event: BatchAttacked, *, narrow: bool = False) -> str:
    """Return how far a stage of an attack has come.

    Such as 'autoattack, fab-t: 250 of 683; 680 of 1,000 still right (68.0%)'; narrow, at most 56 characters:
    'autoattack, fab-t: 250 of 683; 68.0% still right'.
    """
    name = event.attack if event.attack == event.stage else f"{event.attack}, {event.stage}"
    share = f"{event.right / event.n:.1%}"
    right = f"{share} still right" if narrow else f"{event.right:,} of {event.n:,} still right ({share})"
    return f"{name}: {event.verdicts.done:,} of {len(event.verdicts.queue):,}; {right}"


def epoch_line(record: Record) -> str:
    """Return the row of an epoch below `HEADING`."""
    loss = f"{record.loss:.4f}" if record.loss is not None else "-"
    residuals = "-"
    if record.primal is not None and record.dual is not None:
        residuals = f"{record.primal:.2g} / {record.dual:.2g}"
    return (
        f"{record.phase:>5} {record.epoch:>5}  {loss:>6}  {record.clean:>7.2%}  {record.robust:>7.2%}"
        f"  {record.nonzeros:>10,}  {residuals:<17} {record.seconds:>6,.1f} s"
    )
