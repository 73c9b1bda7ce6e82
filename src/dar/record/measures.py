"""What is measured on held-out prompts, under the one name and in the one form that every table shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A metric as people read it.

    key: in metrics.jsonl, without `eval/`.
    label: where there is little room; `name` has what it counts in, too.
    form: format specification of its figures; `z`, as none of them is ever −0.
    column: of the completion tables, from which intervals come; None where a completion alone has no such figure.
    """

    key: str
    label: str
    form: str = "z.3f"
    unit: str = ""
    column: str | None = None

    @property
    def name(self) -> str:
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def is_part(self) -> bool:
        """Whether it is a single one of several rewards."""
        return self.key.startswith("rewards/") and self.key.endswith("/mean")

    def shown(self, value: float) -> str:
        return format(value, self.form)


MEASURES = (
    Measure("reward", "reward", "+z.3f", column="reward"),
    Measure("gold", "gold reward", "+z.3f", "not trained on", "gold"),
    Measure("rewards/accuracies", "accuracy", ".1%", "held-out pairs"),
    Measure("rewards/margins", "margin", "+z.3f", "chosen less rejected"),
    Measure("loss", "loss", "z.4f", "held-out completions of the data"),
    Measure("kl/ref", "KL to π₀", "z.3f", "nats per completion", "kl_ref"),
    Measure("completions/mean_length", "length", ",.1f", "tokens", "length"),
    Measure("completions/clipped_ratio", "missing EOS", ".1%", column="finish_reason"),
    Measure("entropy", "entropy", "z.3f", "nats per token"),
    Measure("completions/distinct_2", "distinct-2"),
)
_RETENTION = "retention/"
KL_OLD = Measure("kl/old_k3", "KL to π_t", "z.3f", "nats per completion")
BY_KEY = {measure.key: measure for measure in (*MEASURES, KL_OLD)}


def evaluations(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The held-out evaluations among lines of metrics.jsonl, their keys without `eval/`."""
    found = [line for line in lines if any(key.startswith("eval/") for key in line)]
    return [{key.removeprefix("eval/"): value for key, value in line.items()} for line in found]


def measures_of(evaluation: Mapping[str, float]) -> list[Measure]:
    """The measures that an evaluation has; single rewards, where there are several, after their total, and last the
    tasks of alerts `retention`."""
    names = {key: key.removeprefix("rewards/").removesuffix("/mean") for key in evaluation}
    all_of_it = (Measure(key, name, "+z.3f", column=f"reward/{name}") for key, name in names.items())
    parts = [measure for measure in all_of_it if measure.is_part]
    tasks = [Measure(key, key.removeprefix(_RETENTION), unit="capability retained")
             for key in evaluation if key.startswith(_RETENTION) and not key.endswith("_stderr")]  # fmt: skip
    found = [MEASURES[0], *(parts if len(parts) > 1 else []), *MEASURES[1:], *tasks]
    return [measure for measure in found if measure.key in evaluation]
