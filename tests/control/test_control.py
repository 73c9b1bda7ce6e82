"""Controllers: exact resume, ranks that only fall, dynamics that are a function of seed and episode, clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import SAC
from typer.testing import CliRunner

from dar.cli.app import app
from dar.config.control import ControlSpec, VariationSpec
from dar.control.dynamics import UncertainDynamics, make_environment
from dar.control.layers import Factored, factor, factors, layers_between, spectra, truncate
from dar.control.loop import ControlLoop, learning_rate
from dar.errors import ConfigError
from dar.low_rank import energy_rank
from dar.report.kinds import ControlRun
from dar.report.page import panels_of, render_page
from dar.report.run import load_trainings

TINY: dict[str, Any] = {
    "environment": "InvertedPendulum-v5", "net": [8, 8], "steps": 240, "learning_starts": 30, "batch_size": 8,
    "buffer_size": 1000, "log_every": 40, "device": "cpu", "rank": {"energy": 0.9, "every": 60, "warmup_steps": 10},
    "uncertainty": {"geom.cpole.density": {"spread": 500.0}, "option.gravity.2": {"spread": 2.0, "law": "gaussian"}},
    "evaluation": {"episodes": 2, "perturbations": {"geom.cpole.density": [3000.0, 500.0]}},
}  # fmt: skip


def spec_of(folder: Path, **changes: Any) -> ControlSpec:
    return ControlSpec(**(TINY | changes), output_dir=str(folder))


def loop_of(folder: Path, *, resume: bool = False, **changes: Any) -> ControlLoop:
    return ControlLoop(spec_of(folder, **changes), resume=resume, quiet=True)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("step_time", "memory/peak_gb")} for row in rows]


def _layers(policy: Any) -> dict[str, Any]:
    return {name: net[place] for name, net, place in layers_between(policy)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ControlLoop:
    """A run that was not stopped."""
    loop = loop_of(tmp_path_factory.mktemp("control") / "whole")
    assert loop.run(resume=False) == 240
    return loop


def test_resumed_run_is_the_one_that_was_not_stopped(whole: ControlLoop, tmp_path: Path):
    cut = loop_of(tmp_path / "cut")
    for stop in (25, 137):  # among the random actions, and between two truncations

        def advance(step: int, loop: ControlLoop = cut, stop: int = stop) -> None:
            ControlLoop.advance(loop, step)
            loop.control.is_stopping = step == stop

        cut.advance = advance
        assert cut.run(resume=stop > 25) == stop
        assert cut.model.env.envs[0].rewards  # amidst an episode
        cut = loop_of(tmp_path / "cut", resume=True)
    assert cut.run(resume=True) == 240
    assert rows_of(tmp_path / "cut") == rows_of(whole.folder.path)
    for one, other in zip(cut.model.policy.parameters(), whole.model.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_ranks_only_fall_and_the_rate_starts_again(whole: ControlLoop):
    rows = [row for row in rows_of(whole.folder.path) if "critic_loss" in row]
    for layer in ("actor.latent_pi.2", "critic.qf0.2", "critic.qf1.2"):
        ranks = [row[f"rank/{layer}"] for row in rows]
        assert ranks == sorted(ranks, reverse=True)
        assert ranks[-1] < ranks[0] == 8
    # Constant up to the first truncation; then 10 steps up and 50 down a cosine, again and again.
    rates = [learning_rate(whole.spec, step) / 3e-3 for step in (1, 60, 61, 70, 71, 96, 120, 121)]
    assert rates == pytest.approx([1, 1, 0.1, 1, 1, 0.5, 0.5 * (1 + np.cos(0.98 * np.pi)), 0.1])


def test_full_rank_is_the_same_function_and_a_lower_one_as_near_as_can_be():
    net = {"net_arch": [16, 8, 12]}
    plain, cut = (SAC("MlpPolicy", "InvertedPendulum-v5", policy_kwargs=net, seed=0).policy for _ in "ab")
    observations, actions = torch.randn(32, 4), torch.rand(32, 1)

    def outputs(policy: Any) -> torch.Tensor:
        with torch.no_grad():
            mean, log_std, _ = policy.actor.get_action_dist_params(observations)
            return torch.cat([mean, log_std, *policy.critic(observations, actions)])

    factor(cut, None)
    assert torch.allclose(outputs(cut), outputs(plain), atol=1e-6)
    places = [place for _, _, place in layers_between(cut)]
    assert places == [2, 4] * 5  # neither what reads observations nor what gives actions and values
    before = spectra(cut)
    optimizer = cut.actor.optimizer
    for parameter in cut.critic_target.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    truncate(cut, 0.5)
    assert cut.actor.optimizer is not optimizer
    layers, wholes = (_layers(each) for each in (cut, plain))
    for name, values in before.items():
        rank = energy_rank(torch.tensor(values), 0.5)
        left, right = factors(layers[name])
        assert right.shape[0] == rank < len(values)
        error = torch.linalg.norm(left @ right - wholes[name].weight.data)  # Eckart and Young
        assert error == pytest.approx(float(torch.tensor(values[rank:]).norm()), rel=1e-4)
    for name in ("qf0.2", "qf1.4"):
        one, other = factors(layers[f"critic.{name}"]), factors(layers[f"critic_target.{name}"])
        assert all(torch.equal(*pair) and pair[0] is not pair[1] for pair in zip(one, other, strict=True))
    assert isinstance(layers["actor.latent_pi.2"], Factored)


def test_saved_controller_is_read_by_stable_baselines3_alone(whole: ControlLoop):
    observations = np.random.default_rng(0).normal(size=(16, 4))
    expected = whole.model.predict(observations, deterministic=True)[0]
    whole.save_model()
    read = SAC.load(whole.folder.model / "policy.zip")
    assert read.predict(observations, deterministic=True)[0] == pytest.approx(expected, abs=1e-5)
    assert type(read.policy.actor.latent_pi[2]) is torch.nn.Linear


def test_dynamics_are_a_function_of_seed_and_episode():
    laws = {
        "geom.foot_geom.size.1": VariationSpec(spread=0.1, law=0.2),
        "option.gravity.2": VariationSpec(center=-10.0, spread=2.0),
        "joint.leg_joint.damping.0": VariationSpec(spread=0.5, law="gaussian"),
    }
    env = UncertainDynamics(make_environment("Hopper-v5"), laws, seed=3)
    starts, masses = [], []
    for episode in range(4):
        starts.append(env.reset()[0])
        model = env.base.model
        masses.append(model.body("foot").mass[0])
        assert model.geom("foot_geom").size[1] == pytest.approx(0.195 + 0.1 * np.sin(0.2 * episode))
        assert -12 <= model.opt.gravity[2] <= -8
        env.step(env.action_space.sample())
    assert len({tuple(start) for start in starts}) == 4
    assert masses == sorted(masses)  # a longer foot is a heavier one
    again = UncertainDynamics(make_environment("Hopper-v5"), laws, seed=3)
    again.episode = 2
    assert (again.reset(seed=99)[0] == starts[3]).all()
    assert again.base.model.opt.gravity[2] == env.base.model.opt.gravity[2]
    assert not (UncertainDynamics(make_environment("Hopper-v5"), laws, seed=4).reset()[0] == starts[0]).any()


def test_without_variation_it_is_the_environment_as_it_was():
    env, plain = UncertainDynamics(make_environment("Ant-v5"), {}, seed=0), gymnasium.make("Ant-v5")
    env.reset()
    seed = int(np.random.Generator(np.random.Philox(key=[0, 0], counter=[0, 0, 0, 0])).integers(2**31))
    plain.reset(seed=seed)
    action = env.action_space.sample()
    for _ in range(5):
        assert (env.step(action)[0] == plain.step(action)[0]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": "Hoper-v5"}, "environment 'Hoper-v5' cannot be made.*Did you mean: `Hopper`"),
        ({"environment": "CartPole-v1"}, "none of gymnasium's MuJoCo environments"),
        ({"environment": "nowhere:Env-v0"}, "No module named 'nowhere'"),
        ({"rank": 9}, r"rank: a layer between the hidden layers of net \[8, 8\] has at most rank 8"),
        ({"rank": 1, "net": [64]}, r"net \[64\] has at most rank 0"),
        ({"rank": {"every": 20, "warmup_steps": 5}}, "every must be more than"),
        ({"learning_starts": 240, "rank": None}, "of 240 steps none would learn"),
        ({"uncertainty": {"geom.pole.density": {"spread": 1.0}}}, "did you mean 'geom.cpole'.*geom.rail"),
        ({"uncertainty": {"geom.cpole.friction": {"spread": 1.0}}}, "where that has entries"),
        ({"uncertainty": {"option.gravity.7": {"spread": 1.0}}}, "no number of the model"),
        ({"uncertainty": {"geom.cpole.size.1": {"spread": 0.1}}}, "takes it from something else"),
        ({"uncertainty": {"geom.cpole.mass": {"spread": 0.1}}}, "the model does not set it"),
        ({"uncertainty": {"geom.cpole.size.0": {"spread": 1.0}}}, "the model cannot have"),
        ({"uncertainty": {"option.wind.0": {"spread": 1.0}}}, "without air there is no wind"),
        ({"evaluation": {"perturbations": {"geom.cart.density": [-1.0]}}}, "the model cannot have"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_said_before_anything_trains(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        loop_of(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_report_of_one_run_and_of_several(whole: ControlLoop, tmp_path: Path):
    one = loop_of(tmp_path / "rank-seed0", rank=4, steps=40)
    one.run(resume=False)
    found = load_trainings([whole.folder.path])
    assert isinstance(found, list)
    assert [plot.name for panel in panels_of(found) for plot in panel.plots] == [
        "return", "return_mean", "return_worst", "rank", "perturbed_0", "spectrum", "ranks"
    ]  # fmt: skip
    both = load_trainings([whole.folder.path, tmp_path / "rank-seed0"])
    assert isinstance(both[0], ControlRun)  # pyright: ignore[reportIndexIssue]
    (perturbed,) = [plot for panel in panels_of(both) for plot in panel.plots if plot.name == "perturbed_0"]
    means = [np.mean(point["returns"]) for point in one.folder.evaluation()["points"][1:]]
    assert [series.name for series in perturbed.series] == ["adaptive, β 0.9", "rank"]
    assert (perturbed.series[1].x, perturbed.series[1].y) == ([500.0, 3000.0], means[::-1])
    assert "worst perturbation" in render_page(both)
    listed = json.loads(CliRunner().invoke(app, ["ls", str(tmp_path), "--json"]).stdout)
    shown = [listed[0][key] for key in ("method", "model", "metric", "state")]
    assert shown == ["rank 4", "InvertedPendulum-v5", "eval/return", "finished"]
