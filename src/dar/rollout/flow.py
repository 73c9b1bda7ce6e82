"""The engine that denoises with the trainer's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from dar.batch import Prompt, Rollouts
from dar.config.data import DecodingSpec
from dar.errors import RolloutError
from dar.policies.flow.policy import FlowLogprobs, FlowPolicy, Trajectories
from dar.policies.flow.sde import SDE, gaussian_logprobs
from dar.rollout.protocol import Progress
from dar.rollout.sampling import SamplingKey
from dar.rollout.truncation import PLAIN


class FlowEngine:
    """Samples trajectories by the SDE; greedily, by the ODE from the same noise.

    A prompt's one token is its class label. Every number is keyed by what it is for, so a trajectory is the same
    whatever is sampled beside it. At most `max_rows` images are denoised at once.
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
    def generate(self, prompts: Sequence[Prompt], num_generations: int, *, max_completion_length: int,
                 key: SamplingKey, progress: Progress | None = None,
                 decoding: DecodingSpec = PLAIN) -> Rollouts:  # fmt: skip
        rows = [(prompt, k) for prompt in prompts for k in range(num_generations)]
        labels = torch.tensor([prompt.token_ids[0] for prompt, _ in rows])
        with self.policy.sampler() as module:
            sde = replace(module.sde, sigmas=torch.zeros_like(module.sde.sigmas)) if decoding.greedy else module.sde
            size = (len(sde.times), prod(module.shape))
            bits = torch.stack([key.seeds(each.position, k, prod(size)).view(size) for each, k in rows])
            # 64 random bits as a number between 0 and 1, and that as a quantile of N(0, 1).
            noises = torch.special.ndtri((bits.double() / 2.0**64 + 0.5).clamp(1e-16, 1 - 1e-16)).float()
            portions = zip(noises.split(self.max_rows), labels.split(self.max_rows), strict=True)
            parts = [self._denoise(module, sde, *portion, progress) for portion in portions]
        path, logprobs = (torch.cat(each) for each in zip(*parts, strict=True))
        if not path.isfinite().all():
            raise RolloutError("velocities are not finite: the weights have diverged; lower optim.learning_rate")
        steps = torch.arange(len(sde.sigmas)).expand(len(rows), -1).contiguous()
        tokens = ((num_generations,) * len(prompts), steps, torch.ones_like(steps, dtype=torch.bool))
        states = {"states": path[:, :-1], "nexts": path[:, 1:], "noises": noises[:, 1:]}
        groups = Trajectories(tuple(prompt.token_ids for prompt in prompts), *tokens, **states)
        return Rollouts(
            tuple(prompts),
            groups,
            texts=("",) * len(rows),
            logprobs=torch.zeros_like(logprobs) if decoding.greedy else logprobs,
            finish_reasons=("eos",) * len(rows),
            versions=(self.version,) * len(rows),
            images=path[:, -1].view(-1, *module.shape),
        )

    def _denoise(
        self, module: FlowLogprobs, sde: SDE, noises: Tensor, labels: Tensor, progress: Progress | None
    ) -> tuple[Tensor, Tensor]:
        """([R, T + 1, D] states from t = 1 to 0, [R, T] log-probabilities)."""
        noises, labels = (each.to(sde.times.device) for each in (noises, labels))
        path, logprobs = [noises[:, 0]], []
        for step in range(len(sde.sigmas)):
            steps = torch.full_like(labels, step)
            with self.policy.precision.compute():
                means = module.means(path[-1], labels, steps, sde)
            path.append(means + sde.deviations[step] * noises[:, step + 1])
            logprobs.append(module.reduced(gaussian_logprobs(path[-1], means, sde.deviations[steps])))
            if progress is not None:
                progress(len(labels))
        return torch.stack(path, 1).cpu(), torch.stack(logprobs, 1).cpu()
