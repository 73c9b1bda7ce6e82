"""The policy of the best held-out evaluation so far, as an ordinary model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from dar.collective import from_main
from dar.config.run import RunSpec
from dar.policies.protocol import Policy
from dar.record.card import model_card
from dar.record.folder import RunFolder


@dataclass(frozen=True)
class BestPolicy:
    """Keeps `best/`, with `best.json` in it: the step, the metric and its value.

    What it holds is all that is remembered, so a resumed run goes on comparing where it was.
    """

    spec: RunSpec
    policy: Policy
    folder: RunFolder

    def consider(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Saves the policy if it is better than the one in `best/`; all ranks do at once what the main one decides.

        Args:
            step: completed steps.
            metrics: of a held-out evaluation, with their prefix `eval/`.

        Returns:
            Whether it was saved: the recipe asks for a best one, and this is it.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        best = self.spec.checkpoint.best
        # The mean of a part that applied to no completion is nobody's best.
        if best is None or best.metric not in metrics:
            return False
        value = metrics[best.metric]
        if not from_main(lambda: self.folder.is_better(value, best)):
            return False
        record = {"step": step, "metric": best.metric, "mode": best.mode, "value": value}
        self.policy.save(
            self.folder.best,
            card=model_card(self.spec, [*self.folder.metrics(), {"step": step, **metrics}], self.folder.alerts()),
            notes={"best.json": json.dumps(record, indent=2) + "\n"},
        )
        return True
