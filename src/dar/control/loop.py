"""Training a controller: stable-baselines3's SAC, one step of the environment at a time, its layers cut (AdaRL)."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn

from dar.config.control import AdaptiveRankSpec, ControlSpec, VariationSpec
from dar.control.dynamics import UncertainDynamics, make_environment
from dar.control.layers import factor, merge, spectra, truncate
from dar.files.atomic import written
from dar.learn.checkpoint import TrainState
from dar.learn.optim import learning_rate_factor
from dar.policies.precision import resolve_precision
from dar.record.environment import describe_environment, peak_memory_gb
from dar.record.folder import RunFolder
from dar.run.display import Display
from dar.run.steps import Steps, due
from dar.run.stopping import Control

_SETTINGS = ("learning_rate", "buffer_size", "learning_starts", "batch_size")
_BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class ControlLoop(Steps):
    """One training of a controller; a step is one of the environment. Raises DarError where it cannot be made."""

    def __init__(self, spec: ControlSpec, *, resume: bool = False, overwrite: bool = False, quiet: bool = False):
        self.spec, self.num_steps, self.control, self.initial = spec, spec.steps, Control(), ""
        self.precision, self.display = resolve_precision(spec.runtime), Display(num_steps=spec.steps, quiet=quiet)
        self.dynamics = UncertainDynamics(make_environment(spec.environment), spec.uncertainty, seed=spec.seed)
        env, grid = make_environment(spec.environment), spec.evaluation.perturbations.items()
        points = [(name, {name: VariationSpec(center=at, spread=0.0)}) for name, values in grid for at in values]
        self.tests = [(name, UncertainDynamics(env, at, seed=spec.seed, purpose=1)) for name, at in [("", {}), *points]]
        self.folder = RunFolder(spec.output_dir)
        self.folder.prepare(spec, resume=resume, overwrite=overwrite)
        settings: dict[str, Any] = {key: getattr(spec, key) for key in _SETTINGS}
        settings |= {"policy_kwargs": {"net_arch": spec.net}, "device": self.precision.device}
        self.model: Any = SAC("MlpPolicy", self.dynamics, seed=spec.seed % 2**32, **settings)  # numpy takes 32 bits
        self.model.set_logger(Logger(None, []))
        self.model.ep_info_buffer, self.model.ep_success_buffer = deque(maxlen=spec.log_every), deque()
        if spec.rank is not None:
            factor(self.model.policy, spec.rank if isinstance(spec.rank, int) else None)
        self.optimizer, self._since = self.model.actor.optimizer, time.perf_counter()

    def start(self, resume: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not resume:
            self.folder.start(self.spec, describe_environment(self.precision, world_size=1))

    def trainable(self) -> dict[str, nn.Parameter]:
        return {}  # weights whose shapes change are among the extras

    def advance(self, step: int) -> None:
        self._is_whole, rank, rate = False, self.spec.rank, learning_rate(self.spec, step)
        self.model.lr_schedule = lambda _: rate
        self.model.learn(1, log_interval=None, reset_num_timesteps=False)
        if isinstance(rank, AdaptiveRankSpec) and due(step, rank.every) and step < self.num_steps:
            truncate(self.model.policy, rank.energy)
        if due(step, self.spec.log_every) or step == self.num_steps:
            metrics = {**self._metrics(), "learning_rate": rate}
            self.folder.append_metrics({"step": step, **metrics})
            self.display.step(step, metrics, shown=True)

    def _metrics(self) -> dict[str, float]:
        """Of the episodes that ended since the last line, and of the last gradient step."""
        ended, values = self.model.ep_info_buffer, self.model.logger.name_to_value
        found = {"return": fmean(each["r"] for each in ended)} if ended else {}
        found |= {key: float(values[f"train/{key}"]) for key in ("actor_loss", "critic_loss", "ent_coef") if values}
        found |= {f"rank/{name}": len(each) for name, each in spectra(self.model.policy).items()}
        seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
        ended.clear()
        found |= {"num_episodes": self.dynamics.episode, "memory/peak_gb": peak_memory_gb()}
        return found | {"step_time": seconds / self.spec.log_every}

    def evaluation_due(self, step: int) -> bool:
        return step in (0, self.num_steps) or due(step, self.spec.evaluation.every)

    def evaluate(self, step: int) -> None:
        points, layers = [], spectra(self.model.policy)
        for name, env in self.tests:
            env.episode, episodes = -1, self.spec.evaluation.episodes
            returns, _ = evaluate_policy(self.model, env, episodes, return_episode_rewards=True, warn=False)
            points.append({"parameter": name, "value": env.centers.get(name), "returns": returns})
        means = [fmean(point["returns"]) for point in points]
        found = {"return": means[0], "return_mean": fmean(means), "return_worst": min(means)}
        found |= {"rank": fmean(map(len, layers.values()))} if layers else {}
        self.folder.write_evaluation({"step": step, "points": points, "spectra": layers})
        self.folder.append_metrics({"step": step, **{f"eval/{name}": value for name, value in found.items()}})
        self.display.note("  ".join([f"after step {step}:", *(f"{key} {each:.1f}" for key, each in found.items())]))

    def state(self, step: int) -> TrainState:
        taken, place = len(self.model.env.envs[0].rewards), self.model.replay_buffer.pos
        numbers = {"episode": self.dynamics.episode, "taken": taken, "place": place}
        return TrainState(step, 0, self.initial, algorithm=numbers)

    def extras(self) -> dict[str, Tensor]:
        model, buffer, kept = self.model, self.model.replay_buffer, io.BytesIO()
        torch.save([model.get_parameters(), model.log_ent_coef.data, list(model.ep_info_buffer)], kept)
        rows = {name: torch.from_numpy(getattr(buffer, name)[: buffer.size()]) for name in _BUFFER if buffer.size()}
        return rows | {"kept": torch.frombuffer(kept.getbuffer(), dtype=torch.uint8)}

    def restore(self, state: TrainState, extras: Mapping[str, Tensor]) -> None:
        model, buffer, numbers = self.model, self.model.replay_buffer, state.algorithm
        kept, log_ent_coef, ended = torch.load(io.BytesIO(extras["kept"].numpy().tobytes()), weights_only=True)
        for name, parameter in model.policy.named_parameters():
            parameter.data = kept["policy"][name].to(parameter.device)  # of whatever rank it was
        model.set_parameters(kept, device=model.device)
        model.log_ent_coef.data.copy_(log_ent_coef)
        for name in _BUFFER:
            getattr(buffer, name)[: len(extras[name])] = extras[name].numpy()
        buffer.pos, buffer.full = int(numbers["place"]), len(extras["rewards"]) == buffer.buffer_size
        model.num_timesteps = state.step
        model.ep_info_buffer.extend(ended)
        # The environment comes to where it was by the present episode's actions, taken again.
        self.dynamics.episode = int(numbers["episode"]) - 1
        model._last_obs = model.env.reset()
        for back in range(int(numbers["taken"]), 0, -1):
            if state.step - back < model.learning_starts:
                model.action_space.sample()
            model._last_obs = model.env.step(model.policy.unscale_action(buffer.actions[buffer.pos - back]))[0]

    def save_model(self) -> None:
        """Writes model/policy.zip, which `SAC.load` of stable-baselines3 reads; the loop takes no step after it."""
        merge(self.model.policy)
        with written(self.folder.model) as scratch:
            scratch.mkdir()
            self.model.save(scratch / "policy.zip", exclude=["lr_schedule"])


def learning_rate(spec: ControlSpec, step: int) -> float:
    """Of environment step `step` (from 1): constant, and after each truncation a warm-up and a cosine to the next."""
    if not isinstance(rank := spec.rank, AdaptiveRankSpec) or step <= rank.every:
        return spec.learning_rate
    since = (step - 1) % rank.every
    total = min(rank.every, spec.steps - step + 1 + since)
    times = learning_rate_factor(since, schedule="cosine", warmup_steps=rank.warmup_steps, total_steps=total)
    return spec.learning_rate * times
