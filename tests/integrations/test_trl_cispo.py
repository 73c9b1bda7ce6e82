"""CISPO against the loss of TRL's own GRPO trainer, given the log-probabilities that its model would say."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.builders import assert_close, make_scored, padded, random_rewards, random_rows

from dar.algorithms.policy_gradient import CISPO
from dar.batch import TokenOutputs
from dar.config.policy_gradient import CISPOSpec

pytest.importorskip("trl", reason="the extra dar-rlhf[trl] is not installed")
from trl.trainer.grpo_trainer import GRPOTrainer


def trainer(logprobs: torch.Tensor, bound: float) -> Any:
    """What `_compute_loss` reads of a trainer in one process whose generation batch is one optimizer step's."""
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda totals, **_: totals, sync_gradients=True),
        args=SimpleNamespace(use_bias_correction_kl=False, steps_per_generation=1, delta=None),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
        importance_sampling_level="token",
        loss_type="cispo",
        epsilon_low=0.2,
        epsilon_high=bound,
        beta=0.0,
        **dict.fromkeys(("aux_loss_enabled", "use_vllm", "_entropy_bonus_enabled", "use_adaptive_entropy"), False),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
    )


@pytest.mark.parametrize("bound", [5.0, 1.1])
@pytest.mark.parametrize("seed", range(3))
def test_loss_gradient_and_clipped_share_are_trls(seed: int, bound: float):
    current, old, _ = random_rows(seed, 8)
    scored = make_scored(random_rewards(seed, 2, 4), old, dtype=torch.float64)
    algorithm = CISPO(CISPOSpec(clip_high=bound - 1))
    batch, _ = algorithm.weigh(scored)
    ours, theirs = (padded(current, dtype=torch.float64).requires_grad_() for _ in range(2))
    terms = algorithm.terms(TokenOutputs(ours), batch)
    loss = terms.losses.sum() / batch.denominator
    ids, mask = scored.groups.completion_ids, scored.mask
    stub = trainer(theirs, bound)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1].long(),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": scored.old_logprobs,
        "num_items_in_batch": mask.sum(),
    }
    wanted = GRPOTrainer._compute_loss(stub, None, inputs)
    assert_close(loss, wanted, rtol=1e-12)
    found, expected = torch.autograd.grad(loss, ours)[0], torch.autograd.grad(wanted, theirs)[0]
    assert_close(found, expected, rtol=1e-12)
    # TRL counts tokens above the bound with A > 0 alone; with A < 0 instead it counts the others.
    GRPOTrainer._compute_loss(stub, None, inputs | {"advantages": -batch.advantages})
    shares = stub._metrics["train"]["cispo_clip_ratio"]
    assert sum(shares) == pytest.approx(terms.means["cispo/clipped"].value, rel=1e-6)
    assert (sum(shares) > 0) == (bound < 2)
