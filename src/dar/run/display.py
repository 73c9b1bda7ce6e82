"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dar.console import Console, about, new_table
from dar.record.alerts import Alert
from dar.record.measures import BY_KEY, measures_of
from dar.shown import one_line


class _Column(NamedTuple):
    """A figure of the step lines.

    keys: of metrics.jsonl; the first that a step has.
    rank: the highest are left out first where a line is too narrow for all.
    """

    label: str
    meaning: str
    keys: tuple[str, ...]
    form: str
    width: int
    rank: int = 0


_COLUMNS = (
    _Column("reward", "", ("reward",), "+z.3f", 7),
    _Column("return", "of training episodes", ("return",), "z,.1f", 8),
    _Column("loss", "", ("loss",), "z.4f", 8),
    _Column("accuracy", "share of pairs", ("rewards/accuracies", "accuracy"), ".0%", 8),
    _Column("margin", "chosen less rejected", ("rewards/margins", "margin"), "+z.3f", 7),
    _Column("KL π₀", BY_KEY["kl/ref"].unit, ("kl/ref",), "z.3f", 7),
    _Column("length", "tokens", ("completions/mean_length",), ".1f", 6, 2),
    _Column("no EOS", "completions cut off", ("completions/clipped_ratio",), ".0%", 6, 1),
    _Column("tied", "groups of equal rewards", ("frac_reward_zero_std",), ".0%", 4, 3),
    _Column("rounds", "of sampling", ("rollout/rounds",), ".0f", 6, 7),
    _Column("ESS", "effective sample size of the weights", ("weights/ess_fraction",), ".0%", 4, 4),
    _Column("grad norm", "before clipping", ("grad_norm",), "z.4g", 9, 5),
    _Column("s", "seconds", ("step_time",), ".1f", 5, 6),
)
_LEFT = _Column("left", "until the end", (), "", 6)
_HEADER_EVERY = 40
"""Step lines under one header."""

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
        self._columns: tuple[_Column, ...] = ()
        self._lines = 0
        self._started, self._done = 0.0, -1

    @contextmanager
    def live(self, done: int) -> Iterator[None]:
        """Shows the bar (on a terminal) while the block runs; `done` steps were taken before."""
        if self.quiet or not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[phase]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            self._task = self._progress.add_task("train", total=self.num_steps, completed=done, phase="", left="")
            yield
        self._progress = None

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar (on a terminal) for work before the first step; the block calls what it is given after each piece."""
        if self.quiet or not self.console.is_terminal:
            yield lambda: None
            return
        columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
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
        """A finished step: the bar moves, and (`shown`) a line sums it up, under a header that says what is what."""
        now = time.perf_counter()
        if self._done < 0:  # what comes before the first step, such as an evaluation, says nothing of the pace
            self._started, self._done = now - metrics["step_time"], step - 1
        left = about((now - self._started) / (step - self._done) * (self.num_steps - step))
        if self._progress is not None:
            self._progress.update(self._task, completed=step, left=f"{left} left")
        if num_cut := metrics.get("lora/cut"):
            mean, low, high = (metrics[f"lora/rank_{name}"] for name in ("mean", "min", "max"))
            self.note(f"step {step} cut {num_cut} adapters: ranks are {low} to {high} now, {mean:.1f} in the mean")
        if not shown or self.quiet:
            return
        place = max(4, 2 * len(str(self.num_steps)) + 1)
        columns = _fitting(metrics, self._columns, self.console.width - place)
        if columns != self._columns:
            meanings = [f"{one.label}: {one.meaning}" for one in columns if one.meaning and one not in self._columns]
            self.console.print("; ".join(meanings), style="dim")
        if columns != self._columns or self._lines % _HEADER_EVERY == 0:
            self.note("  ".join(["step".rjust(place), *(one.label.rjust(one.width) for one in columns)]), style="bold")
        self._columns, self._lines = columns, self._lines + 1
        cells = [_cell(one, metrics) for one in columns[:-1]] + [left.rjust(_LEFT.width)]
        self.note("  ".join([f"{step}/{self.num_steps}".rjust(place), *cells]))
        if metrics.get("frac_reward_zero_std") == 1 or metrics.get("pairs/tied_fraction") == 1:
            self.note("no signal: the rewards of every group are all the same, which teaches nothing", style="yellow")

    def note(self, text: str, *, style: str = "") -> None:
        """A line of plain text (unless quiet)."""
        if not self.quiet:
            self.console.print(text, style=style, soft_wrap=True)

    def alert(self, alert: Alert) -> None:
        """A rule of the recipe's alerts is broken."""
        self.note(f"alert after step {alert.step}, {alert.rule}: {alert.message}", style=_ALERT_STYLES[alert.action])

    def completion(self, prompt: str, completion: str, reward: float) -> None:
        """One sampled completion."""
        self.note(f"  prompt: {one_line(prompt)}\n  reward {reward:+z.3f}: {one_line(completion)}")

    def before_after(self, before: Mapping[str, float], after: Mapping[str, float], title: str) -> None:
        """The table of what training changed."""
        shown = new_table(title, "held-out", "before", "after")
        for row in measures_of(after):
            if row.key in before:
                indent = "  " if row.is_part else ""
                shown.add_row(f"{indent}{row.name}", *(row.shown(found[row.key]) for found in (before, after)))
        self.console.print(shown)

    def side_by_side(self, temperature: float | None, rows: Sequence[tuple[str, str, str]]) -> None:
        """(prompt, completion before, completion after) triples, and at which temperature they were drawn to be read;
        None: as the evaluation's."""
        how = "" if temperature is None else f", drawn to be read at temperature {temperature:.2f}"
        shown = new_table(f"completions of held-out prompts{how}", "prompt", "before", "after", is_text=True)
        for row in rows:
            shown.add_row(*row)
        self.console.print(shown)


def _fitting(metrics: Mapping[str, float], before: Sequence[_Column], width: int) -> tuple[_Column, ...]:
    """The columns for a step's figures and for those of the lines before, as many as fit beside each other."""
    # Where rewards are maximised a loss says little, and its level nothing.
    has = [one for one in _COLUMNS if one in before or any(key in metrics for key in one.keys)]
    kept = [one for one in has if one.label != "loss" or "reward" not in metrics] + [_LEFT]
    while len(kept) > 2 and sum(one.width + 2 for one in kept) > width:
        kept.remove(max(kept, key=lambda one: one.rank))
    return tuple(kept)


def _cell(column: _Column, metrics: Mapping[str, float]) -> str:
    """Its figure; – in a step that has none."""
    found = next((metrics[key] for key in column.keys if key in metrics), None)
    return ("–" if found is None else format(found, column.form)).rjust(column.width)
