"""DAR in verl: the loss and its gradient are those of this library, whatever verl does to the batch on the way."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dar.algorithms.regression import DAR
from dar.batch import Batch, TokenGroups, TokenOutputs
from dar.config.regression import DARSpec
from dar.errors import ConfigError

pytest.importorskip("verl", reason="verl is not installed: make test-integrations")
pytestmark = pytest.mark.integrations

import dar.integrations.verl  # noqa: E402, F401 - before verl's trainer

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
ray_trainer = pytest.importorskip("verl.trainer.ppo.ray_trainer")
ROOT = Path(__file__).parents[2]
PROMPTS, WIDTH = 3, 7
TWO_KEYS = ["algorithm.adv_estimator=dar", "actor_rollout_ref.actor.policy_loss.loss_mode=dar"]


def configuration(*overrides: str) -> Any:
    """What verl's command line makes of these."""
    hydra = pytest.importorskip("hydra")
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", overrides=list(overrides))


def batch_of(num_generations: int, *, with_reference: bool = True) -> Batch:
    """Ragged completions, some with another's words in their midst."""
    torch.manual_seed(num_generations)
    rows = PROMPTS * num_generations
    mask = torch.arange(WIDTH) < torch.randint(2, WIDTH + 1, (rows, 1))
    mask[::3, 1] = False
    mask[:, 0] = True
    old, ref = (-3 * torch.rand(rows, WIDTH).masked_fill(~mask, 0) for _ in range(2))
    rewards = torch.randn(PROMPTS, num_generations)
    sizes = (num_generations,) * PROMPTS
    return Batch(
        TokenGroups(((1,),) * PROMPTS, sizes, torch.zeros(rows, WIDTH, dtype=torch.int64), mask),
        old_logprobs=old,
        ref_logprobs=ref if with_reference else None,
        rewards=rewards,
        has_eos=torch.ones(rows, dtype=torch.bool),
    )


def columns_of(batch: Batch, order: torch.Tensor, *, padding: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The same rows as verl has them: in another order, filled up with rows that nothing was sampled in."""
    rewards = torch.zeros(batch.mask.shape)
    rewards[torch.arange(len(rewards)), batch.mask.sum(1) - 1] = batch.rewards.flatten()
    columns = {
        "response_mask": batch.mask.long(),
        "old_log_probs": batch.old_logprobs,
        "token_level_rewards": rewards,
        **({} if batch.ref_logprobs is None else {"ref_log_prob": batch.ref_logprobs}),
    }
    uids = [f"prompt {row // batch.rewards.shape[1]}" for row in range(len(rewards))]
    filled = {name: torch.cat([values[order], values.new_zeros(padding, WIDTH)]) for name, values in columns.items()}
    return filled, np.array([*(uids[row] for row in order), *["filler"] * padding], dtype=object)


def settings_of(dar: dict[str, Any]) -> Any:
    return pytest.importorskip("omegaconf").OmegaConf.create({"adv_estimator": "dar", "dar": dar})


def advantages(columns: dict[str, torch.Tensor], uids: np.ndarray, *, dar: dict[str, Any], num_generations: int) -> Any:
    """As `RayPPOTrainer.fit` calls it."""
    data = ray_trainer.DataProto.from_dict(tensors=columns, non_tensors={"uid": uids})
    return ray_trainer.compute_advantage(
        data,
        adv_estimator="dar",
        gamma=1.0,
        lam=1.0,
        num_repeat=num_generations,
        norm_adv_by_std_in_grpo=True,
        config=settings_of(dar),
    ).batch


SETTINGS = {
    "defaults": {},
    "chosen beta": {"alpha": 0.3, "beta": {"target_kl": 0.4}},
    "raw rewards, mean weight 1": {"beta": 0.5, "normalize": "none", "weight_scale": "mean"},
    "no reference": {"alpha": 0, "beta": 0.3},
    "clipped": {"beta": 0.2, "w_clip": 1.5, "weight_scale": "clip"},
    "pushed down, too": {"beta": 0.5, "center_weights": True},
}


@pytest.mark.parametrize("num_generations", [1, 4])
@pytest.mark.parametrize("dar", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(("ranks", "portions"), [(1, [9]), (1, [2, 3, 4]), (2, [4, 5])])
def test_loss_and_gradient_are_those_of_the_algorithm(
    num_generations: int, dar: dict[str, Any], ranks: int, portions: list[int]
):
    batch = batch_of(num_generations, with_reference=dar.get("alpha") != 0)
    algorithm = DAR(DARSpec(**dar))
    weighted, _ = algorithm.weigh(batch)
    logprobs = (batch.old_logprobs + 0.3 * torch.randn(batch.mask.shape)).requires_grad_()
    loss = algorithm.terms(TokenOutputs(logprobs), weighted).losses.sum() / weighted.denominator
    (gradient,) = torch.autograd.grad(loss, logprobs)

    order = torch.randperm(len(batch.mask))
    padding = 5
    columns, uids = columns_of(batch, order, padding=padding)
    found = advantages(columns, uids, dar=dar, num_generations=num_generations)
    filler = torch.full((padding, WIDTH), -1.0)
    there = torch.cat([logprobs.detach()[order], filler]).requires_grad_()
    total = torch.zeros(())
    # What verl's workers do: each rank its part, in micro-batches, all divided by the rows of the mini-batch.
    bounds = [round(len(there) * sum(portions[:each]) / sum(portions)) for each in range(len(portions) + 1)]
    for start, stop in pairwise(bounds):
        part, _ = core_algos.get_policy_loss_fn("dar")(
            old_log_prob=found["old_log_probs"][start:stop],
            log_prob=there[start:stop],
            advantages=found["advantages"][start:stop],
            response_mask=found["response_mask"][start:stop].bool(),
            loss_agg_mode="token-mean",
            config=SimpleNamespace(
                global_batch_info={"dp_size": ranks, "global_batch_size": len(there), "batch_num_tokens": 1}
            ),
        )
        total = total + part / ranks  # DDP and FSDP average gradients
    (there_gradient,) = torch.autograd.grad(total, there)

    torch.testing.assert_close(total, loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(there_gradient[: len(order)], gradient[order], atol=1e-6, rtol=1e-6)
    assert not there_gradient[len(order) :].any()


def test_prompt_that_lost_completions_is_compared_with_those_that_are_left():
    batch = batch_of(3)
    lost = torch.tensor([False, True, *[False] * 7])
    rewards = batch.rewards.masked_fill(lost.view(3, 3), torch.nan)
    weighted, _ = DAR(DARSpec()).weigh(Batch(**{**vars(batch), "rewards": rewards}).rewarded())
    columns, uids = columns_of(batch, (~lost).nonzero().flatten(), padding=0)
    found = advantages(columns, uids, dar={}, num_generations=3)
    torch.testing.assert_close(found["advantages"][:, 0], weighted.weights)


def test_correction_for_the_sampler_scales_each_tokens_gradient():
    batch = batch_of(2)
    logprobs = batch.old_logprobs.clone().requires_grad_()
    ratios = torch.rand(batch.mask.shape)
    columns, uids = columns_of(batch, torch.arange(6), padding=0)
    found = advantages(columns, uids, dar={}, num_generations=2)
    gradients = [
        torch.autograd.grad(
            core_algos.get_policy_loss_fn("dar")(
                log_prob=logprobs,
                advantages=found["advantages"],
                response_mask=batch.mask,
                config=SimpleNamespace(global_batch_info={}),
                rollout_is_weights=weights,
            )[0],
            logprobs,
        )[0]
        for weights in (None, ratios)
    ]
    torch.testing.assert_close(gradients[1], gradients[0] * ratios)


def test_reference_that_was_not_computed_and_sessions_of_several_outputs_are_refused():
    columns, uids = columns_of(batch_of(2, with_reference=False), torch.arange(6), padding=0)
    with pytest.raises(ValueError, match="DAR reads the reference, but the batch has no ref_logprobs"):
        advantages(columns, uids, dar={}, num_generations=2)
    with pytest.raises(ConfigError, match=r"a prompt has 2 outputs, but rollout\.n is 1"):
        advantages(columns, uids, dar={"alpha": 0}, num_generations=1)


def test_two_keys_turn_grpo_into_dar_and_load_the_reference():
    assert not needs_reference("algorithm.adv_estimator=grpo")
    assert needs_reference("algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.use_kl_loss=true")
    assert needs_reference(*TWO_KEYS)
    assert needs_reference(*TWO_KEYS, "+algorithm.dar={alpha: 0.2, beta: {target_kl: 0.5}, w_clip: inf}")
    assert not needs_reference(*TWO_KEYS, "+algorithm.dar.alpha=0")
    assert needs_reference(*TWO_KEYS, "actor_rollout_ref.actor.ppo_epochs=2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (TWO_KEYS[:1], "must both be dar, .* but are dar and vanilla"),
        (TWO_KEYS[1:], "must both be dar, .* but are gae and dar"),
        (["+algorithm.dar.alpha=0.2"], "must both be dar, .* but are gae and vanilla"),
        ([*TWO_KEYS, "+algorithm.dar.betta=0.2"], "unknown key .betta. .*beta"),
        ([*TWO_KEYS, "+algorithm.dar.alpha=2"], "DARSpec: alpha"),
        ([*TWO_KEYS, "+algorithm.dar.updates=2"], r"algorithm\.dar\.updates has another name in verl, .*ppo_epochs"),
        ([*TWO_KEYS, "+algorithm.dar.normalize_weights=group"], "in one micro-batch, which verl may tear apart"),
        (
            [*TWO_KEYS, "+algorithm.dar.center_weights=true", "actor_rollout_ref.actor.ppo_epochs=2"],
            "center_weights is for one update per batch, not 2",
        ),
        ([*TWO_KEYS, "algorithm.use_kl_in_reward=true"], r"use_kl_in_reward holds to π₀ a second time"),
        ([*TWO_KEYS, "actor_rollout_ref.actor.use_kl_loss=true"], r"use_kl_loss holds to π₀ a second time"),
        ([*TWO_KEYS, "algorithm.rollout_correction.bypass_mode=true"], "bypass_mode puts a loss of its own"),
        ([*TWO_KEYS, "algorithm.rollout_correction.rollout_rs=token_k1"], "rollout_rs takes tokens out"),
    ],
)
def test_configuration_of_another_loss_is_refused_before_anything_starts(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        needs_reference(*overrides)


def needs_reference(*overrides: str) -> bool:
    """As `verl.trainer.main_ppo.main` asks before it starts Ray."""
    return ray_trainer.need_reference_policy(configuration(*overrides))


def test_trainer_hands_its_batch_over_and_logs_what_the_weights_are_like(monkeypatch: pytest.MonkeyPatch):
    trainer_base = pytest.importorskip("verl.trainer.ppo.v1.trainer_base", exc_type=ImportError)
    tensordict = pytest.importorskip("tensordict")
    batch = batch_of(4)
    columns, uids = columns_of(batch, torch.randperm(12), padding=4)
    columns["rm_scores"] = columns.pop("token_level_rewards")
    lengths = [max(int(row.nonzero().max()) + 1 if row.any() else 1, 1) for row in columns["response_mask"]]
    nested = {
        name: torch.nested.as_nested_tensor([row[:n] for row, n in zip(values, lengths)], layout=torch.jagged)
        for name, values in columns.items()
    }
    stored: dict[str, Any] = {}
    queue = SimpleNamespace(
        kv_batch_get=lambda **_: tensordict.TensorDict(
            {**nested, "uid": tensordict.NonTensorStack(*uids)}, batch_size=len(uids)
        ),
        kv_batch_put=lambda fields, **_: stored.update(fields.items()),
    )
    monkeypatch.setattr(trainer_base, "tq", queue)
    trainer = SimpleNamespace(config=configuration(*TWO_KEYS, "actor_rollout_ref.rollout.n=4"))
    metrics: dict[str, float] = {}
    rows = trainer_base.KVBatchMeta(partition_id="train", keys=[str(row) for row in range(16)], tags=[{}] * 16)
    trainer_base.PPOTrainer._compute_advantage(trainer, rows, metrics)
    weighted, expected = DAR(DARSpec()).weigh(batch)
    assert metrics == pytest.approx(expected)
    assert float(stored["advantages"].to_padded_tensor(0.0)[:, 0].sum()) == pytest.approx(
        float(weighted.weights.sum()) * 16 / 12
    )


def test_verl_loads_the_plug_in_by_itself_and_pays_for_it_where_it_trains_alone(tmp_path: Path):
    """As installed: verl finds the entry point that pyproject.toml declares."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]["dar"]
    installed = tmp_path / "dar_rlhf-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: dar-rlhf-of-the-test\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[verl.plugins]\ndar = {entry}\n")
    script = (
        "import sys, verl\n"
        "assert 'dar.integrations.verl' in sys.modules\n"
        "assert not {'verl.trainer', 'dar.algorithms', 'dar.assembly', 'scipy'} & sys.modules.keys()\n"
        "from verl.workers.utils.losses import get_policy_loss_fn\n"
        "assert get_policy_loss_fn('dar')\n"
        "assert 'dar.assembly' not in sys.modules\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    environment = os.environ | {"PYTHONPATH": path, "VERL_USE_EXTERNAL_PLUGINS": "auto"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
