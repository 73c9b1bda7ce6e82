"""What the report says, for machines: the same figures as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dar.report.comparison import RecipeRuns, arms_of, final_figures, win_matrix
from dar.report.kinds import AnyRuns, ControlRun, RecordedRun, RewardModelRun, Run
from dar.report.missing import missing
from dar.report.results import changes, training_change


def record(runs: AnyRuns) -> dict[str, Any]:
    """The figures of one or more runs; `heldout` of a reward model and of controllers is what they were tested for.

    Returns:
        `runs`, what `run_record` says of each; `arms`, for every recipe its name, the folders of its runs and its final
        figures by their keys in metrics.jsonl (without `eval/`; `seconds` is the time of the training steps): means
        over the runs, with half the width of their 95 % intervals over seeds; and `wins`, [row][column] the share of
        the shared held-out prompts on which the row's reward is above the column's, with its interval (null on the
        diagonal).
    """
    if isinstance(runs, RewardModelRun):
        return {"runs": [_tested(runs)]}
    arms = arms_of(runs)
    return {
        "runs": [_tested(run) if isinstance(run, ControlRun) else run_record(run) for run in runs],
        "arms": [_arm_record(arm) for arm in arms],
        "wins": [[asdict(cell) if cell else None for cell in row] for row in win_matrix(arms)],
    }


def _tested(run: RewardModelRun | ControlRun) -> dict[str, Any]:
    how_far = {"folder": str(run.path), "steps_done": run.last_step, "is_finished": run.is_finished}
    return how_far | {"heldout": run.evaluation}


def run_record(run: Run) -> dict[str, Any]:
    """One run: how far it came, its alerts, and every held-out measure before and after.

    `heldout` is keyed as in metrics.jsonl, without `eval/`; `change` is the mean of the paired difference over the
    held-out prompts with half the width of its 95 % interval, null for a measure that no single completion has.
    `training_reward` is there where nothing was held out: the mean over the first and the last tenth of the steps.
    `missing` is there of another trainer's run: what its page has not, and why.
    """
    training = training_change(run)
    found: dict[str, Any] = {
        "folder": str(run.path),
        "algorithm": run.method,
        "seed": run.spec.seed,
        "steps_done": run.last_step,
        "steps": run.spec.steps,
        "is_finished": run.is_finished,
        "stopped_by": asdict(run.stopped_by) if run.stopped_by else None,
        "alerts": [asdict(alert) for alert in run.alerts],
        "heldout": {
            row.measure.key: {
                "before": row.before,
                "after": row.after,
                "change": asdict(row.change) if row.change else None,
            }
            for row in changes(run)
        },
    }
    if isinstance(run, RecordedRun):
        found["missing"] = missing(run)
    if not run.evaluations and training is not None:
        found["training_reward"] = {"first": training[0], "last": training[1], "steps": training[2]}
    return found


def _arm_record(arm: RecipeRuns) -> dict[str, Any]:
    figures = {key: asdict(found) for key, found in final_figures(arm).items()}
    return {"name": arm.name, "runs": [str(run.path) for run in arm.runs], "figures": figures}
