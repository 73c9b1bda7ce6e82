"""Flow-matching policies: their grid is diffusers', their trajectories are their own, what cannot be one is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from support.flows import ROWS, flow_recipe, make_flow
from support.handmade import make_spec

from dar.assembly.loop import build_loop
from dar.assembly.objects import Objects
from dar.assembly.plan import make_plan
from dar.batch import Prompt
from dar.config.data import DecodingSpec
from dar.config.flow import TEXT_ONLY, FlowSDESpec
from dar.config.model import ModelSourceSpec
from dar.errors import ConfigError, DataError, RewardError
from dar.learn.learner import Learner
from dar.policies.flow.digits import trained
from dar.policies.flow.loading import Labels, load_flow
from dar.policies.flow.policy import FlowPolicy
from dar.policies.flow.sde import build_sde
from dar.policies.precision import Precision
from dar.rewards import digits
from dar.rollout.flow import FlowEngine
from dar.rollout.sampling import SamplingKey
from dar.run.loop import Loop
from dar.trainer import run_loop

PROMPTS = [Prompt(index, str(label), (label,), {}) for index, label in enumerate((0, 2, 1))]
KEY = SamplingKey(0, "train", 1)


def policy_of(model: Any, **sde: Any) -> FlowPolicy:
    spec = FlowSDESpec(**{"steps": 3, **sde})
    return FlowPolicy(model, build_sde(spec), Precision(torch.device("cpu"), torch.float32), spec.logprob)


def engine_of(policy: FlowPolicy, *, max_rows: int = 100) -> FlowEngine:
    engine = FlowEngine(max_rows=max_rows)
    engine.sync(policy, 0)
    return engine


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grid_and_step_without_noise_are_those_of_diffusers(shift: float):
    sde = build_sde(FlowSDESpec(steps=4, shift=shift))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(sde.times, scheduler.sigmas)
    torch.testing.assert_close(sde.times[:-1] * 1000, scheduler.timesteps)
    states, velocities = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.3, 0.7]])
    ode = replace(sde, sigmas=torch.zeros(4))
    theirs = scheduler.step(velocities, scheduler.timesteps[0], states).prev_sample  # pyright: ignore
    torch.testing.assert_close(ode.means(states, velocities, torch.tensor([0])), theirs)


def test_reweights_are_the_papers():
    # 1/Δ on an even grid is the same everywhere; β = 1 + η² (1 − t)/(2t) is 1.03125 at t = ½ with η = ¼, 1 at t = 1.
    assert build_sde(FlowSDESpec(steps=2)).reweights.tolist() == [1.0, 1.0]
    dance = build_sde(FlowSDESpec(steps=2, noise="dance_grpo", eta=0.25)).reweights
    assert float(dance[1] / dance[0]) == pytest.approx(1.03125)
    bent = build_sde(FlowSDESpec(steps=3, shift=3.0))
    assert (bent.reweights * -bent.times.diff()).std() < 1e-7


def test_a_trajectory_is_the_same_whatever_is_sampled_beside_it():
    policy = policy_of(make_flow())
    all_of_them = engine_of(policy).generate(PROMPTS, 4, max_completion_length=3, key=KEY)
    alone = engine_of(policy, max_rows=1).generate(PROMPTS[1:2], 4, max_completion_length=3, key=KEY)
    torch.testing.assert_close(alone.groups.nexts, all_of_them.groups.nexts[4:8])  # pyright: ignore
    assert all_of_them.images is not None
    assert all_of_them.images.shape == (12, 1, 4, 4)
    # Another class, or another completion, is another image.
    assert len(all_of_them.images.flatten(1).unique(dim=0)) == 12


def test_noise_is_standard_normal():
    policy = policy_of(make_flow())
    noises = engine_of(policy).generate(PROMPTS, 400, max_completion_length=3, key=KEY).groups.noises  # pyright: ignore
    assert float(noises.mean()) == pytest.approx(0, abs=4 / noises.numel() ** 0.5)
    assert float(noises.square().mean()) == pytest.approx(1, abs=4 * (2 / noises.numel()) ** 0.5)
    # P(|ε| > 2) = .0455
    assert float((noises.abs() > 2).float().mean()) == pytest.approx(0.0455, abs=0.004)


@pytest.mark.parametrize("logprob", ["mean", "sum"])
def test_log_probabilities_are_those_of_the_gaussian(logprob: str):
    policy = policy_of(make_flow(), logprob=logprob)
    rollouts = engine_of(policy).generate(PROMPTS, 2, max_completion_length=3, key=KEY)
    torch.testing.assert_close(policy.logprobs(rollouts.groups, max_tokens=1), rollouts.logprobs)
    noises: Any = rollouts.groups.noises  # pyright: ignore
    per_dimension = torch.distributions.Normal(0, 1).log_prob(noises) - policy.module.sde.deviations.log().view(1, 3, 1)
    expected = per_dimension.mean(2) if logprob == "mean" else per_dimension.sum(2)
    torch.testing.assert_close(rollouts.logprobs, expected, rtol=1e-4, atol=1e-4)


def test_greedy_is_the_ode_from_the_same_noise():
    policy = policy_of(make_flow())
    found = engine_of(policy).generate(PROMPTS, 1, max_completion_length=3, key=KEY, decoding=DecodingSpec(greedy=True))
    groups: Any = found.groups
    state = groups.states[:, 0]
    ode = replace(policy.module.sde, sigmas=torch.zeros(3))
    with torch.no_grad():
        for step in range(3):
            state = policy.module.means(state, torch.tensor([0, 2, 1]), torch.full((3,), step), ode)
    torch.testing.assert_close(groups.nexts[:, -1], state)
    assert not found.logprobs.any()


# --- runs ------------------------------------------------------------------------------------------------------------


def make_loop(folder: Path, *, sde: dict[str, Any] | None = None, **keys: Any) -> Loop:
    settings = {
        **flow_recipe(folder / "flow", **(sde or {})),
        **{"steps": 2, "prompts_per_step": 4, "num_generations": 4, "output_dir": str(folder / "run")},
        **{"optim": {"learning_rate": 1e-2}, "runtime": {"device": "cpu", "precision": "fp32"}},
    }
    return build_loop(make_spec(**settings | keys), Objects(train_rows=ROWS), quiet=True)


def test_saved_policy_is_a_model_that_a_run_begins_with(tmp_path: Path):
    loop = make_loop(tmp_path, algorithm="flow_grpo")
    assert run_loop(loop, resume=False, command="test").steps == 2
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "library_name: diffusers" in card
    again = load_flow(ModelSourceSpec(path=str(tmp_path / "run")))
    for one, other in zip(again.parameters(), loop.learner.policy.trainable().values(), strict=True):
        assert torch.equal(one, other)


def test_no_row_is_left_out_for_a_density(tmp_path: Path):
    # Of the tokens of a text, most would be.
    runtime = {"device": "cpu", "precision": "fp32", "negligible_share": 0.9}
    loop = make_loop(tmp_path, algorithm={"type": "dar", "beta": 0.5}, runtime=runtime)
    assert isinstance(loop.learner, Learner)
    assert loop.step(1)["rows/skipped_fraction"] == 0.0


def test_dars_regularisation_is_of_whole_trajectories(tmp_path: Path):
    # From the second step on π_t has left π₀, and log w_reg = α Σ_k log π₀ − log π_t.
    loop = make_loop(tmp_path, algorithm={"type": "dar", "alpha": 0.5, "beta": 1.0}, sde={"logprob": "sum"})
    loop.step(1)
    rollouts, pending = loop.collector.collect(2, 0, 4, phase=loop._phase)
    pending.cancel()
    drift = rollouts.logprobs - loop.learner.policy.ref_logprobs(rollouts.groups, max_tokens=100)
    expected = -0.5 * float(drift.sum(1).mean())
    assert abs(expected) > 0.01
    assert loop.step(2)["weights/log_w_reg_mean"] == pytest.approx(expected, rel=1e-3)


# --- refused ---------------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, **keys: Any) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        make_loop(tmp_path, **keys)
    return str(caught.value)


OTHER: dict[str, Any] = {
    "model.sha256": "ab", "reference.sha256": "ab", "data.system_prompt": "be kind", "data.max_prompt_length": 3,
    "data.long_prompts": "drop", "sampling.max_completion_length": 3, "sampling.temperature": 0.5,
    "sampling.correction": "token", "sampling.correction_cap": 3.0, "sampling.max_staleness": 1,
    "sampling.prompts_per_request": 1, "engine.max_cache_tokens": 9, "evaluation.top_k": 3, "evaluation.top_p": 0.5,
    "optim.null_space": {"data": "x.jsonl"}, "runtime.sharding": "full", "teacher": {"path": "x"},
}  # fmt: skip


@pytest.mark.parametrize("key", TEXT_ONLY)
def test_keys_that_only_texts_have_are_refused_by_name(key: str):
    section, _, name = key.partition(".")
    base: dict[str, Any] = {"model": {"type": "flow", "path": "x"}, "data": {"train": "x"}}
    base |= {section: {"path": "x"}} if section == "reference" else {}
    value = OTHER.get(key, True)
    changes = {section: {**base.get(section, {}), name: value} if name else value}
    with pytest.raises(ConfigError, match=re.escape(f"{key} is for language models")):
        make_spec(**{**base, "rewards": ["support.flows:brightness"], **changes})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"algorithm": "ppo"}, "ppo reads logits, probabilities or a critic, which no flow-matching policy has"),
        ({"algorithm": "dppo"}, "dppo reads logits, probabilities or a critic, which no flow-matching policy has"),
        ({"algorithm": "bapo"}, "bapo reads logits, probabilities or a critic, which no flow-matching policy has"),
        ({"algorithm": {"type": "lco", "loss": "mse"}}, "lco reads logits, probabilities or a critic"),
        ({"algorithm": "dpo"}, "dpo reads texts, but model.type is flow"),
        ({"rewards": ["sentiment"]}, "the reward sentiment reads texts"),
        ({"alerts": ["missing_eos"]}, "the alert missing_eos reads texts"),
        ({"sde": {"steps": 1}}, "model.sde.steps: Input should be greater than or equal to 2 (found 1)"),
        ({"sde": {"shift": 1e6}}, "model.sde.shift: Input should be less than or equal to 100"),
        ({"sde": {"eta": 2.0}}, "model.sde.eta: Input should be less than or equal to 1.4"),
    ],
)
def test_what_no_flow_can_do_is_refused(tmp_path: Path, keys: dict[str, Any], said: str):
    assert said in refusal(tmp_path, **keys)


def test_plan_and_texts_say_what_they_are_not_for(tmp_path: Path):
    recipe = flow_recipe(tmp_path / "flow")
    with pytest.raises(ConfigError, match="try dar train RECIPE steps=1"):
        make_plan(make_spec(**recipe))
    with pytest.raises(ConfigError, match="is a model of diffusers, which writes no text"):
        build_loop(make_spec(model=str(tmp_path / "flow")), Objects(train_rows=ROWS), quiet=True)
    sampling = {"max_completion_length": 8}
    text = make_spec(model="toy:letters", algorithm="grpo_guard", sampling=sampling)
    with pytest.raises(ConfigError, match="grpo_guard reads denoising steps"):
        build_loop(text, Objects(train_rows=[{"prompt": "a"}]), quiet=True)


def test_folders_that_are_no_class_conditional_velocity_models(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    blocks: Any = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
    network = UNet2DModel(sample_size=4, block_out_channels=(8,), norm_num_groups=2, **blocks)
    network.save_pretrained(tmp_path / "unconditional")
    make_flow(out_channels=2).save_pretrained(tmp_path / "variance")
    for name, said in (
        ("none", "the model path .*none does not exist"),
        ("empty", "no diffusers model can be loaded from .*empty"),
        ("unconditional", "holds a UNet2DModel without class labels"),
        ("variance", "predicts more than a velocity"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_flow(ModelSourceSpec(path=str(tmp_path / name)))


@pytest.mark.parametrize("prompt", ["3", "-1", "three", "²", "99999999999999999999"])
def test_a_prompt_that_is_no_class_is_named_with_its_row(prompt: str):
    with pytest.raises(DataError, match=r'rows: row 4: the prompt .* is no class of the model, which knows "0" to "2"'):
        Labels(3).read(prompt, here="rows: row 4")
    assert Labels(3).read(" 2\n", here="") == (2,)


# --- digits ----------------------------------------------------------------------------------------------------------


def test_rewards_of_digits_know_their_data():
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow

    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = [str(label) for label in data.target]
    # Each on the half that it has not seen.
    assert sum(digits.legibility(labels[1::2], images[1::2])) / len(labels[1::2]) > 0.9
    assert sum(digits.held_out_legibility(labels[::2], images[::2])) / len(labels[::2]) > 0.7
    wrong = [str((label + 1) % 10) for label in data.target]
    assert sum(digits.legibility(wrong, images)) / len(wrong) < 0.05
    assert digits.ink(torch.stack([-torch.ones(1, 8, 8), torch.zeros(1, 8, 8), 3 * torch.ones(1, 8, 8)])) == [0, 0.5, 1]
    with pytest.raises(RewardError, match=re.escape("read images [B, 1, 8, 8], and these are [2, 3, 8, 8]")):
        digits.ink(torch.zeros(2, 3, 8, 8))


def test_digits_are_learnt():
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow

    model = trained(steps=40)
    data: Any = load_digits()
    images = torch.tensor(data.images[:200], dtype=torch.float32).unsqueeze(1) / 8 - 1
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        velocity = model((images + noise) / 2, torch.full((200,), 500.0), class_labels=torch.tensor(data.target[:200]))
    # E ‖ε − x_0‖² is 1 of the noise and more of the digits; a velocity of 0 has all of it.
    assert (velocity.sample - (noise - images)).square().mean() < 0.7 * (noise - images).square().mean()
