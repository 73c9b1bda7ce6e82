"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from dar.console import Console
from dar.run.alerts import Alert
from dar.run.measures import BY_KEY, KL_OLD, Measure, measures_of
from dar.shown import one_line

_STEP = (
    BY_KEY["reward"],
    BY_KEY["kl/ref"],
    KL_OLD,
    Measure("accuracy", "accuracy", ".0%"),
    Measure("margin", "margin", "+.3f"),
    BY_KEY["completions/mean_length"],
    BY_KEY["completions/clipped_ratio"],
    Measure("weights/ess_fraction", "ESS", ".0%"),
    Measure("grad_norm", "grad", ".2f"),
    Measure("step_time", "s", ".1f"),
)

_ALERT_STYLES = {"log": "yellow", "mark": "bold yellow", "stop": "bold red"}


class Display:
    """Progress and summaries of one run. `quiet` prints nothing but what is asked for by name (tables at the end)."""

    def __init__(self, *, num_steps: int, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console()
        self.quiet = quiet
        self.num_steps = num_steps
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._phase_started = 0.0
        self._phase_tokens = 0
        self._phase = ""

    @contextmanager
    def live(self, done: int) -> Iterator[None]:
        """Shows the bar (on a terminal) while the block runs."""
        if self.quiet or not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[phase]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            self._task = self._progress.add_task("train", total=self.num_steps, completed=done, phase="")
            yield
        self._progress = None

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar (on a terminal) for work before the first step; the block calls what it is given after each piece."""
        if self.quiet or not self.console.is_terminal:
            yield lambda: None
            return
        columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)

    def phase(self, name: str) -> None:
        """A new phase of the step has begun."""
        self._phase, self._phase_started, self._phase_tokens = name, time.perf_counter(), 0
        self._show_phase(name)

    def tokens(self, count: int) -> None:
        """More tokens were processed in this phase."""
        self._phase_tokens += count
        elapsed = time.perf_counter() - self._phase_started
        if elapsed > 0.2:
            self._show_phase(f"{self._phase} {self._phase_tokens / elapsed:,.0f} tok/s")

    def _show_phase(self, text: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, phase=text)

    def step(self, step: int, metrics: Mapping[str, float], *, shown: bool) -> None:
        """A finished step: the bar moves, and (`shown`) a line sums it up."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        if not shown:
            return
        parts = [f"{one.label} {one.shown(metrics[one.key])}" for one in _STEP if one.key in metrics]
        self.note(f"step {step}/{self.num_steps}  " + "  ".join(parts))

    def note(self, text: str, *, style: str = "") -> None:
        """A line of plain text (unless quiet)."""
        if not self.quiet:
            self.console.print(text, style=style, soft_wrap=True)

    def alert(self, alert: Alert) -> None:
        """A rule of the recipe's alerts is broken."""
        self.note(f"alert after step {alert.step}, {alert.rule}: {alert.message}", style=_ALERT_STYLES[alert.action])

    def completion(self, prompt: str, completion: str, reward: float) -> None:
        """One sampled completion."""
        self.note(f"  prompt: {one_line(prompt)}\n  reward {reward:+.3f}: {one_line(completion)}")

    def before_after(self, before: Mapping[str, float], after: Mapping[str, float], title: str) -> None:
        """The table of what training changed."""
        table = Table(title=title, title_justify="left")
        for heading in ("held-out", "before", "after"):
            table.add_column(heading, justify="left" if heading == "held-out" else "right")
        for row in measures_of(after):
            if row.key in before:
                indent = "  " if row.is_part else ""
                table.add_row(f"{indent}{row.name}", *(row.shown(found[row.key]) for found in (before, after)))
        self.console.print(table)

    def side_by_side(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """(prompt, completion before, completion after) triples."""
        table = Table(show_lines=True)
        for heading in ("prompt", "before", "after"):
            table.add_column(heading, ratio=1)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
