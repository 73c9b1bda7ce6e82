"""Dynamic sampling: groups that teach nothing are replaced by those of fresh prompts, until the batch is full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dar.advantages import tied_groups
from dar.batch import Rollouts, joined
from dar.collective import failing_together, gathered
from dar.learn.learner import Phase
from dar.learn.ranks import own_share
from dar.rewards import RewardTable, join_tables
from dar.rewards.combine import reports
from dar.run.collect import Known, OnlineCollector


@dataclass(frozen=True)
class ResamplingCollector(OnlineCollector):
    """Samples and scores a step's prompts, then as many fresh ones as groups were tied, `max_rounds` times at most.

    Fresh prompts are the stream's next, so none comes twice in an epoch, and random numbers are those of a prompt's
    position, as ever. All ranks share every round, and see all its rewards when they say what is tied. A batch has the
    groups that were not, in the order they were drawn in, and the whole last round.
    """

    def collect(self, step: int, first: int, stop: int, *, phase: Phase) -> tuple[Rollouts, Known]:
        sampling, size, per_prompt = self.spec.sampling, self.spec.prompts_per_step, self.spec.num_generations
        assert sampling.resample_tied is not None
        with phase("rollout"):
            self.engine.sync(self.policy, step - 1)
        rounds, kept, missing = list[tuple[Rollouts, RewardTable]](), list[Tensor](), size
        while missing and len(rounds) <= sampling.resample_tied.max_rounds:
            drawn = sum(map(len, kept))
            rounds.append(self._round(step, range(drawn, drawn + missing), (stop - first) * per_prompt, phase))
            kept.append(~tied_groups(rounds[-1][1].total))
            missing -= int(kept[-1].sum())
        keep = torch.cat(kept)
        drawn, num_tied = len(keep), int((~keep).sum())
        keep[drawn - len(kept[-1]) :] = True
        parts, tables = zip(*rounds)
        rollouts, table = joined(parts), join_tables(tables)
        self.stream.replaced[step - 1] = drawn - size
        with phase("reward"):
            said = reports(self.rewards.rewards, f"step {step}")
        said |= {
            "rollout/rounds": len(rounds),
            "rollout/tied_fraction": num_tied / drawn,
            "rollout/replaced_fraction": (drawn - size) / drawn,
            "rollout/discarded_tokens": rollouts.num_tokens - rollouts.select(keep).num_tokens,
            "rollout/num_scored": self.stream.first(step) * per_prompt,
        }
        places = keep.cumsum(0)  # in the batch, from 1
        own = keep & (places > first) & (places <= stop)
        return rollouts.select(own), Known(replace(table.select(own), reported=table.reported | said))

    def _round(self, step: int, places: Sequence[int], part_of: int, phase: Phase) -> tuple[Rollouts, RewardTable]:
        """Completions of the prompts at these places after the step's first, and their rewards: those of all ranks."""
        (own, has_own), part = own_share(places), None
        with failing_together():
            with phase("rollout"):
                rollouts = self._answer(self.engine.generate, step, own[0], own[-1] + 1, self.progress)
            if has_own:
                with phase("reward"):
                    part = rollouts, self._scoring(step, rollouts).finish(part_of=part_of)
        parts, tables = zip(*filter(None, gathered(part)))
        return joined(parts), join_tables(tables)
