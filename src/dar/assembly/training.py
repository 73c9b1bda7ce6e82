"""A loop that runs to its end: the trained model saved, and what training changed shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dar.assembly.export import push_model, report_html
from dar.collective import from_main
from dar.config.run import HubSpec
from dar.errors import CheckpointError
from dar.files.atomic import write_text
from dar.record.alerts import Alert
from dar.record.card import model_card
from dar.record.measures import evaluations
from dar.run.loop import Loop


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    steps: completed; fewer than asked for after Ctrl-C, or where an alert stopped the run.
    metrics: the lines of metrics.jsonl.
    output_dir: the run folder.
    stopped_by: the alert that asked for the end of the run, if one did.
    """

    steps: int
    metrics: list[dict[str, Any]] = field(repr=False)
    output_dir: str
    stopped_by: Alert | None = None

    @property
    def model_dir(self) -> str:
        """The trained model's folder, once the run is finished."""
        return str(Path(self.output_dir) / "model")

    def report(self, path: str | Path | None = None) -> Path:
        """Writes the report of the run, by default `report.html` in its folder, and returns where it is."""
        target = Path(path or Path(self.output_dir) / "report.html")
        write_text(target, report_html(Path(self.output_dir)))
        return target


def run_loop(loop: Loop, *, resume: bool | Path, command: str) -> TrainResult:
    """Runs a loop; when it is finished, saves the model, shows the before/after table, and uploads.

    Args:
        loop: from `dar.assembly.loop.build_loop`.
        resume: continue from the newest checkpoint, or from that one.
        command: for the model card.

    Raises:
        DarError: as `Loop.run`; of an upload, once all else is done.
    """
    try:
        done = loop.run(resume=resume)
    finally:
        loop.end()
    metrics = loop.folder.metrics()
    if done == loop.spec.steps:
        save_policy(loop, loop.folder.model, command=command)
        if loop.is_main:
            show_before_after(loop, metrics)
        if (hub := loop.spec.hub) is not None:
            loop.display.note(f"uploaded: {from_main(lambda: _upload(loop, hub))}")
    return TrainResult(done, metrics, str(loop.folder.path), from_main(lambda: loop.stopped_by))


def save_policy(loop: Loop, folder: Path, *, command: str) -> None:
    """Saves a loop's policy with its card, on every rank; `command` is what was run. Raises as `Policy.save`."""
    card = model_card(loop.spec, loop.folder.metrics(), loop.folder.alerts(), command=command)
    loop.learner.policy.save(folder, card=card)


def _upload(loop: Loop, hub: HubSpec) -> str:
    run, settings = loop.folder.path, hub.model_dump(exclude={"repository"})
    try:
        return push_model(loop.folder.model, run, hub.repository, **settings)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. The run is finished and {loop.folder.model} is written: upload it later with --resume, or "
            f"`dar export {run} OUT --push {hub.repository}`"
        ) from error


def show_before_after(loop: Loop, metrics: list[dict[str, Any]]) -> None:
    """The held-out table and three completions side by side, read from the run folder."""
    found = evaluations(metrics)
    if loop.display.quiet or len(found) < 2:
        return
    before, after = found[0], found[-1]
    loop.display.before_after(before, after, title=str(loop.folder.path))
    temperature, rows = loop.folder.side_by_side()
    if rows:
        loop.display.side_by_side(temperature, rows)
