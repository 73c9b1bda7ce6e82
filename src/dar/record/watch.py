"""Watching a run as it goes on: the recipe's alerts, asked after every line of metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dar.config.alerts import AnyAlert
from dar.record.alerts import Alert, metrics_read, newly_fired


class Watch:
    """The alerts of a run and, for each, what it reads of the lines so far.

    stopped_by: the first alert that asked for the end of the run, since it was started or resumed.
    """

    def __init__(self, rules: Sequence[AnyAlert]) -> None:
        self.stopped_by: Alert | None = None
        self._rules = [(rule, metrics_read(rule), list[dict[str, float]]()) for rule in rules]

    def see(self, line: Mapping[str, float]) -> list[Alert]:
        """A new line of metrics.jsonl: the alerts that it raises."""
        found = [newly_fired(rule, history) for rule, history in self._take(line)]
        fired = [alert for alert in found if alert is not None]
        if self.stopped_by is None:
            self.stopped_by = next((alert for alert in fired if alert.action == "stop"), None)
        return fired

    def restore(self, lines: Iterable[Mapping[str, float]]) -> None:
        """The lines of a run that goes on: what they raised was told of at its time."""
        for line in lines:
            self._take(line)

    def _take(self, line: Mapping[str, float]) -> list[tuple[AnyAlert, list[dict[str, float]]]]:
        """Adds the line to the histories of the rules that it has something for."""
        concerned = [(rule, keys, history) for rule, keys, history in self._rules if line.keys() >= set(keys)]
        for _, keys, history in concerned:
            history.append({key: line[key] for key in ("step", *keys)})
        return [(rule, history) for rule, _, history in concerned]
