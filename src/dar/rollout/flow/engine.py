"""The engine that denoises with the trainer's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

from dar.batch import Prompt, Rollouts
from dar.config.data import DecodingSpec
from dar.errors import RolloutError
from dar.policies.flow.logprobs import FlowLogprobs
from dar.policies.flow.policy import FlowPolicy
from dar.policies.flow.sde import gaussian_logprobs
from dar.policies.flow.trajectories import Trajectories
from dar.rollout.protocol import Progress
from dar.rollout.sampling import SamplingKey
from dar.rollout.truncation import PLAIN


class FlowEngine:
    """Samples trajectories by the SDE; greedily, by the ODE from the same noise.

    A prompt's one token is its class label. Every number is keyed by what it is for, so a trajectory is the same
    whatever is sampled beside it.

    Args:
        max_rows: images denoised at once.
    """

    reproduces: Literal["tokens", "requests", "nothing"] = "tokens"
    policy: FlowPolicy

    def __init__(self, *, max_rows: int) -> None:
        self.max_rows = max_rows

    def sync(self, policy: FlowPolicy, version: int) -> None:
        self.policy, self.version = policy, version

    def close(self) -> None:
        """Nothing is held that is not the policy's."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        *,
        max_completion_length: int,
        key: SamplingKey,
        progress: Progress | None = None,
        decoding: DecodingSpec = PLAIN,
    ) -> Rollouts:
        with self.policy.sampler() as module:
            num_steps, size = module.sde.num_steps, prod(module.shape)
            rows = [(prompt, k) for prompt in prompts for k in range(num_generations)]
            noises = torch.stack([key.normals(p.position, k, (num_steps + 1) * size) for p, k in rows])
            noises = noises.view(len(rows), num_steps + 1, size)
            labels = torch.tensor([prompt.token_ids[0] for prompt, _ in rows])
            parts = [
                self._denoise(module, *part, greedy=decoding.greedy, progress=progress)
                for part in zip(noises.split(self.max_rows), labels.split(self.max_rows), strict=True)
            ]
        path, logprobs = (torch.cat(each) for each in zip(*parts, strict=True))
        if not path.isfinite().all():
            raise RolloutError(
                "the policy's velocities are not finite, so nothing can be sampled from it. The weights have probably "
                "diverged: continue from an earlier checkpoint with a lower optim.learning_rate."
            )
        groups = Trajectories(
            prompt_ids=tuple(prompt.token_ids for prompt in prompts),
            group_sizes=(num_generations,) * len(prompts),
            completion_ids=torch.arange(num_steps).expand(len(rows), -1).contiguous(),
            mask=torch.ones(len(rows), num_steps, dtype=torch.bool),
            states=path[:, :-1],
            nexts=path[:, 1:],
            noises=noises[:, 1:],
        )
        return Rollouts(
            prompts=tuple(prompts),
            groups=groups,
            texts=("",) * len(rows),
            logprobs=logprobs,
            finish_reasons=("eos",) * len(rows),
            versions=(self.version,) * len(rows),
            images=path[:, -1].view(-1, *module.shape),
        )

    def _denoise(
        self, module: FlowLogprobs, noises: Tensor, labels: Tensor, *, greedy: bool, progress: Progress | None
    ) -> tuple[Tensor, Tensor]:
        """([R, T + 1, D] states from t = 1 to 0, [R, T] log-probabilities)."""
        sde = module.sde.deterministic() if greedy else module.sde
        noises, labels = (each.to(sde.times.device) for each in (noises, labels))
        path, logprobs = [noises[:, 0]], []
        for step in range(sde.num_steps):
            steps = torch.full_like(labels, step)
            with self.policy.precision.compute():
                means = module.means(path[-1], labels, steps, sde)
            deviations = sde.deviations[steps]
            path.append(means + deviations.unsqueeze(1) * noises[:, step + 1])
            found = module.reduced(gaussian_logprobs(path[-1], means, deviations))
            logprobs.append(torch.zeros_like(found) if greedy else found)
            if progress is not None:
                progress(len(labels))
        return torch.stack(path, 1).cpu(), torch.stack(logprobs, 1).cpu()
