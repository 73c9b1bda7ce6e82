"""Uncertain dynamics: MuJoCo environments whose physical parameters are others in every episode."""

# What of mujoco is compiled has no types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from operator import setitem
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv

from dar.config.control import VariationSpec
from dar.errors import ConfigError
from dar.files.hints import nearest_hint


class UncertainDynamics(gymnasium.Wrapper):
    """An environment whose model is compiled anew for every episode, with that episode's parameters.

    Parameters and start are functions of (seed, purpose, number of the episode, from 0) alone, by Philox, so that a
    resumed run has the same ones; a seed that `reset` is given is not used.

    Raises:
        ConfigError: the model has no such parameter, or a value of it is impossible or changes nothing.
    """

    def __init__(self, env: gymnasium.Env, variations: Mapping[str, VariationSpec], *, seed: int, purpose: int = 0):
        super().__init__(env)
        self.base: Any = env.unwrapped
        self.key, self.variations, self.centers, self.episode = [seed, purpose], variations, dict[str, float](), -1
        for name, each in variations.items():
            nominal = _number(mujoco.MjSpec.from_file(self.base.fullpath), name)[0]
            self.centers[name] = center = nominal if each.center is None else each.center
            reach = each.spread * (3 if each.law == "gaussian" else 1)
            low, high = (self._compiled({name: center + side * reach}) for side in (-1, 1))
            if math.isnan(center) or (reach and _bytes(low) == _bytes(high)):
                raise ConfigError(f"{name} cannot vary: the model does not set it, or takes it from something else")
            if name.startswith("option.wind") and "option.density" not in variations:
                raise ConfigError(
                    f"{name}: without air there is no wind: add option.density, with a center such as 1.2"
                )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.episode += 1
        random = np.random.Generator(np.random.Philox(key=self.key, counter=[0, 0, 0, self.episode]))
        start = int(random.integers(2**31))
        drawn = {name: self.centers[name] + v.spread * self._z(v.law, random) for name, v in self.variations.items()}
        self.base.model = self._compiled(drawn)
        self.base.data = mujoco.MjData(self.base.model)
        self.action_space.seed(start)
        return self.env.reset(seed=start, options=options)

    def _z(self, law: str | float, random: np.random.Generator) -> float:
        if not isinstance(law, str):
            return math.sin(law * self.episode)
        return random.uniform(-1, 1) if law == "uniform" else float(np.clip(random.standard_normal(), -3, 3))

    def _compiled(self, values: Mapping[str, float]) -> mujoco.MjModel:
        file = mujoco.MjSpec.from_file(self.base.fullpath)
        for name, value in values.items():
            _number(file, name)[1](value)
        try:
            return file.compile()
        except ValueError as error:
            raise ConfigError(f"the model cannot have {dict(values)}: {error}") from error


def make_environment(name: str) -> gymnasium.Env:
    """A MuJoCo environment of gymnasium. Raises ConfigError where it is unknown, not installed or of another kind."""
    try:
        env = gymnasium.make(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigError(f"environment '{name}' cannot be made: {error}") from error
    if not isinstance(env.unwrapped, MujocoEnv):
        raise ConfigError(f"environment '{name}' is none of gymnasium's MuJoCo environments, such as Hopper-v5")
    return env


def _number(file: mujoco.MjSpec, name: str) -> tuple[float, Callable[[float], object]]:
    """A parameter's value, and what sets another."""
    kinds = {"body": file.bodies, "geom": file.geoms, "joint": file.joints, "actuator": file.actuators}
    kind, *path = name.split(".")
    try:
        owner = file.option if kind == "option" else getattr(file, kind)(path.pop(0)) if kind in kinds else None
        found, *index = getattr(owner, path[0]), *map(int, path[1:])
        setter = partial(setitem, found, *index) if index else partial(setattr, owner, path[0])
        return float(found[index[0]] if index else found), setter
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        known = [f"{kind}.{each.name}" for kind, many in kinds.items() for each in many if each.name]
        raise ConfigError(
            f"{name} is no number of the model{nearest_hint('.'.join(name.split('.')[:2]), known)}: write "
            "KIND.NAME.ATTRIBUTE, and .INDEX where that has entries, such as geom.NAME.friction.0, or "
            f"option.gravity.2. It has {', '.join(known)}"
        ) from error


def _bytes(model: mujoco.MjModel) -> bytes:
    mujoco.mj_saveModel(model, None, found := np.empty(mujoco.mj_sizeModel(model), np.uint8))
    return found.tobytes()
