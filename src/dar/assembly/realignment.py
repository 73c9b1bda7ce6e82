"""What a run of TRACE fixes before its first step: verdicts on the pairs, their triage, and impact weights."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dar.algorithms.realignment import IMPACT
from dar.assembly.before import Before
from dar.assembly.data import RunData
from dar.collective import from_main
from dar.config.realignment import TRACESpec
from dar.config.run import RunSpec
from dar.data.logged import LoggedSet
from dar.errors import CheckpointError, DataError
from dar.learn.impact import gradient_agreement
from dar.objectives.realignment import Triage, impact_weights, triage
from dar.ops import effective_sample_size
from dar.policies.protocol import Policy
from dar.record.folder import RunFolder
from dar.rewards import ask_oracle, load_function
from dar.rewards.combine import keyword_arguments
from dar.run.display import Display

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TriagedPairs:
    """Pairs with what becomes of them.

    logged: the pairs; each completion's reward is the verdict on it, 1 or 0.
    actions: one per pair.
    agreement: ⟨g_J, ∇ℓ_i⟩ of each pair, None for retained pairs and where no gold pairs were asked.
    weights: w_i of each pair, 0 for retained ones; they sum to 1.
    """

    logged: LoggedSet
    actions: tuple[Triage, ...]
    agreement: tuple[float | None, ...]
    weights: tuple[float, ...]

    @property
    def conflict(self) -> list[int]:
        """Which pairs do not comply."""
        return [index for index, action in enumerate(self.actions) if action is not Triage.RETAIN]

    def summary(self) -> str:
        """How many pairs go which way, for people."""
        counts = Counter(action.value for action in self.actions)
        parts = ", ".join(f"{counts[action.value]} to {action.value}" for action in Triage)
        return f"triage of {len(self.actions)} pairs: {parts}"

    def labelled(self) -> LoggedSet:
        """The pairs with w_i · N on both completions, N being the number of conflicting pairs."""
        scaled = (weight * len(self.conflict) for weight in self.weights)
        return _changed(self.logged, ({"labels": {IMPACT: weight}} for weight in scaled for _ in range(2)))

    def columns(self) -> dict[str, Sequence[Any]]:
        """A table for the run folder, one row per pair."""
        verdicts = [[completion.reward > 0 for completion in group.completions] for group in self.logged.groups]
        return {
            "row": [group.prompt.position for group in self.logged.groups],
            "action": [action.value for action in self.actions],
            "chosen_complies": [chosen for chosen, _ in verdicts],
            "rejected_complies": [rejected for _, rejected in verdicts],
            "agreement": list(self.agreement),
            "weight": list(self.weights),
        }


class Realignment(Before):
    """Verdicts and triage from the data alone; impact weights from gradients at the initial weights.

    Raises ConfigError where the oracle cannot be imported.
    """

    pairs: TriagedPairs
    is_saved: bool

    def __init__(self, spec: RunSpec, method: TRACESpec) -> None:
        self.spec, self.method = spec, method
        self.oracle = None if method.oracle is None else load_function(method.oracle, what="oracle")

    def passes(self, data: RunData) -> Iterator[str]:
        if self.method.oracle is not None:
            yield f"once: ask {self.method.oracle} about {2 * len(data.train)} completions"
        if data.gold is not None:
            yield f"once: the gradient of {len(data.gold.groups)} gold pairs, and of each conflicting pair by itself"

    def look(self, data: RunData, folder: RunFolder, *, resume: bool) -> None:
        """Sorts every pair by the oracle's verdicts, or by those it came with; all conflicting pairs weigh the same.

        Raises:
            RewardError: the oracle failed, or returned something else than verdicts.
            DataError: no pair is in conflict with the rules.
            CheckpointError: what the run folder has is of other data.
        """
        assert data.logged is not None
        saved = _saved_pairs(data.logged, folder) if resume else None
        self.is_saved = saved is not None
        self.pairs = saved or self._triaged(data.logged)

    def _triaged(self, logged: LoggedSet) -> TriagedPairs:
        name, oracle = self.method.oracle, self.oracle
        if oracle is not None:
            logged = _with_verdicts(logged, from_main(lambda: ask_oracle(str(name), oracle, _arguments(logged))))
        actions = tuple(triage(*(each.reward > 0 for each in group.completions)) for group in logged.groups)
        conflict = sum(action is not Triage.RETAIN for action in actions)
        if not conflict:
            raise DataError(
                f"{self.spec.data.train.path}: by the verdicts of {name or 'the column chosen_complies'} the chosen "
                f"completion of every pair complies with the new rules ({len(actions)} pairs), so there is nothing to "
                "realign. If that is wrong, look at the verdicts."
            )
        weights = tuple(0.0 if action is Triage.RETAIN else 1 / conflict for action in actions)
        return TriagedPairs(logged, actions, (None,) * len(actions), weights)

    def measure(self, data: RunData, policy: Policy, display: Display) -> LoggedSet:
        """Impact weights: a forward and backward pass for each pair that is in conflict.

        Raises:
            NonFiniteError: a gradient is NaN or infinite.
        """
        if not self.is_saved and data.gold is not None:
            self.pairs = self._weighed(self.pairs, data.gold, policy, display)
        display.note(self.pairs.summary())
        return self.pairs.labelled()

    def _weighed(self, pairs: TriagedPairs, gold: LoggedSet, policy: Policy, display: Display) -> TriagedPairs:
        conflict = pairs.conflict
        display.note(f"impact weights: a forward and backward pass for each of {len(conflict)} conflicting pairs")
        with display.counting("impact weights", len(conflict)) as advance:
            found = gradient_agreement(
                policy,
                gold.groups,
                [pairs.logged.groups[index] for index in conflict],
                [pairs.actions[index] is Triage.INVERT for index in conflict],
                beta=self.method.beta,
                max_tokens=self.spec.runtime.max_tokens_per_microbatch,
                advance=advance,
            )
        if max(found) <= 0:
            log.warning(
                "no conflicting pair's gradient agrees with that of the gold pairs (the largest product is %.3g), so "
                "all weigh the same: gold pairs may be in the wrong order",
                max(found),
            )
        weights = impact_weights(torch.tensor(found, dtype=torch.float64))
        display.note(f"impact weights: they count as {float(effective_sample_size(weights)):.1f} equal ones")
        agreement, weight = dict(zip(conflict, found)), dict(zip(conflict, weights.tolist()))
        indices = range(len(pairs.actions))
        return replace(
            pairs,
            agreement=tuple(agreement.get(index) for index in indices),
            weights=tuple(weight.get(index, 0.0) for index in indices),
        )

    def keep(self, folder: RunFolder) -> None:
        if not self.is_saved:
            folder.write_triage(self.pairs.columns())


def _saved_pairs(logged: LoggedSet, folder: RunFolder) -> TriagedPairs | None:
    """The triage a run was started with, or None where the run folder has none yet.

    Raises:
        CheckpointError: it is of other data.
    """
    table = folder.triage()
    if table is None:
        return None
    if table["row"] != [group.prompt.position for group in logged.groups]:
        raise CheckpointError(
            f"{folder.path / 'triage.parquet'} was made of {len(table['row'])} pairs and the data now has "
            f"{len(logged.groups)}, or others: resume with the data the run was started with"
        )
    verdicts = [verdict for pair in zip(table["chosen_complies"], table["rejected_complies"]) for verdict in pair]
    return TriagedPairs(
        _with_verdicts(logged, verdicts),
        tuple(Triage(action) for action in table["action"]),
        tuple(table["agreement"]),
        tuple(table["weight"]),
    )


def _arguments(logged: LoggedSet) -> Mapping[str, Any]:
    """What an oracle may name: as a reward function's, two completions per prompt, the chosen one first."""
    rows = [(group.prompt, completion) for group in logged.groups for completion in group.completions]
    return keyword_arguments(
        [prompt.content for prompt, _ in rows],
        [prompt.columns for prompt, _ in rows],
        [each.text for _, each in rows],
        completion_ids=[list(each.token_ids) for _, each in rows],
    )


def _with_verdicts(logged: LoggedSet, verdicts: Sequence[bool]) -> LoggedSet:
    """The pairs with one verdict per completion as its reward."""
    return _changed(logged, ({"reward": float(verdict)} for verdict in verdicts))


def _changed(logged: LoggedSet, changes: Iterator[Mapping[str, Any]]) -> LoggedSet:
    """The pairs with other fields of each completion, in order."""
    groups = tuple(
        replace(group, completions=tuple(replace(each, **next(changes)) for each in group.completions))
        for group in logged.groups
    )
    return replace(logged, groups=groups)
