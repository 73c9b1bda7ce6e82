"""What objectives have in common: padding is not read, only what is trained gets a gradient, rows stay apart."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.builders import assert_close
from torch import Tensor

from dar.objectives.actor_critic import clipped_value_loss, token_rewards, whitened
from dar.objectives.logits import lco_kld, lco_kld_on_policy, lco_logcosh, lco_mse
from dar.objectives.policy_gradient import (
    cispo,
    clipped_surrogate,
    dao,
    dao_tokens,
    dppo,
    gspo,
    kl_to_old,
    r2vpo,
    ratio_variance,
    sequence_clipped_surrogate,
)
from dar.objectives.preference import chi_po, dpo, ipo, log_ratio_margin, npo, slic
from dar.objectives.regression import dar_log_weights, weighted_nll
from dar.objectives.squared import squared_error

# A row of three tokens and one of a single token.
MASK = torch.tensor([[True, True, True], [True, False, False]])


class Case(NamedTuple):
    """An objective, the names of its trained, [B, T] and [B] arguments, and its settings."""

    function: Callable[..., Tensor]
    trained: list[str]
    tokens: list[str]
    rows: list[str]
    settings: dict[str, Any]

    @property
    def reads_mask(self) -> bool:
        return "mask" in inspect.signature(self.function).parameters

    def arguments(self) -> dict[str, Tensor]:
        """Numbers near −1: ratios inside every bound, advantages that are not 0."""
        generator = torch.Generator().manual_seed(0)
        shapes = {name: (2, 3) for name in self.tokens} | {name: (2,) for name in self.rows}
        return {
            name: -1 + 0.05 * torch.randn(shape, dtype=torch.float64, generator=generator)
            for name, shape in shapes.items()
        }

    def __call__(self, arguments: dict[str, Tensor], kept: slice = slice(None)) -> Tensor:
        """Its value on some rows."""
        given = {**arguments, **self.settings} | ({"mask": MASK} if self.reads_mask else {})
        return self.function(**{name: x[kept] if isinstance(x, Tensor) else x for name, x in given.items()})


def case(function: Callable[..., Tensor], trained: str, tokens: str, rows: str, **settings: Any) -> Case:
    return Case(function, trained.split(), tokens.split(), rows.split(), settings)


RATIO = ("logprobs", "logprobs old_logprobs", "advantages")
REFERENCE = ("logprobs", "logprobs old_logprobs ref_logprobs", "advantages")
LOGITS = ("logits_of_actions", "logits_of_actions old_logits_of_actions", "advantages")
CHOSEN_AND_REJECTED = "chosen_logprobs rejected_logprobs"
PAIR = (CHOSEN_AND_REJECTED, "", f"{CHOSEN_AND_REJECTED} ref_chosen_logprobs ref_rejected_logprobs")
EPS = {"clip_low": 0.2, "clip_high": 0.2}
CASES = {
    "token_rewards": case(token_rewards, "", "old_logprobs ref_logprobs", "rewards", kl_coef=0.05),
    "whitened": case(whitened, "", "advantages", ""),
    "clipped_value_loss": case(clipped_value_loss, "values", "values old_values returns", "", clip_value=0.2),
    "clipped_surrogate": case(clipped_surrogate, *RATIO, **EPS),
    "clipped_surrogate of tokens": case(clipped_surrogate, "logprobs", "logprobs old_logprobs advantages", "", **EPS),
    "sequence_clipped_surrogate": case(sequence_clipped_surrogate, *RATIO, **EPS),
    "gspo": case(gspo, *RATIO, **EPS),
    "cispo": case(cispo, *RATIO, **EPS),
    "cispo of tokens": case(cispo, "logprobs", "logprobs old_logprobs advantages", "", **EPS),
    "dppo": case(dppo, *RATIO, max_shift=0.9, max_ratio=20.0),
    "dppo of tokens": case(dppo, "logprobs", "logprobs old_logprobs advantages", "", max_shift=0.9, max_ratio=20.0),
    "dao": case(dao, *REFERENCE, alpha=0.4, beta=0.5),
    "dao_tokens": case(dao_tokens, *REFERENCE, alpha=0.4, beta=0.5),
    "r2vpo": case(r2vpo, *RATIO, penalty=0.5),
    "ratio_variance": case(ratio_variance, "", "logprobs old_logprobs", ""),
    "kl_to_old": case(kl_to_old, "logprobs", "logprobs old_logprobs", ""),
    "dar_log_weights": case(dar_log_weights, "", "old_logprobs ref_logprobs", "advantages", alpha=0.1, beta=0.05),
    "squared_error": case(squared_error, "logprobs", "logprobs anchor", "advantages", beta=0.4),
    "weighted_nll": case(weighted_nll, "logprobs", "logprobs", "weights"),
    # Over three tokens of a vocabulary.
    "lco_kld": case(lco_kld, "logits", "logits old_logits", "advantages", actions=torch.tensor([2, 0]), beta=0.4),
    "lco_kld_on_policy": case(lco_kld_on_policy, "logprobs", "logprobs", "advantages", beta=0.4),
    "lco_mse": case(lco_mse, *LOGITS, beta=0.4),
    "lco_logcosh": case(lco_logcosh, *LOGITS, beta=0.4),
    "log_ratio_margin": case(log_ratio_margin, *PAIR),
    "dpo": case(dpo, *PAIR, beta=0.2),
    "ipo": case(ipo, *PAIR, beta=0.2),
    "slic": case(slic, *PAIR, beta=0.2),
    "chi_po": case(chi_po, *PAIR, beta=0.2, max_reward=math.inf),
    "npo": case(npo, "logprobs", "", "logprobs ref_logprobs", beta=0.2),
}


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e4])
@pytest.mark.parametrize("name", [name for name, each in CASES.items() if each.reads_mask])
def test_padding_is_not_read_and_gets_no_gradient(name: str, garbage: float):
    found = []
    for filling in (0.0, garbage):
        each = CASES[name]
        arguments = each.arguments()
        for tokens in each.tokens:
            arguments[tokens] = arguments[tokens].masked_fill(~MASK, filling).requires_grad_(tokens in each.trained)
        result = each(arguments)
        assert result.ndim == 1 or (result[~MASK] == 0).all()
        leaves = [arguments[trained] for trained in each.trained]
        gradients = torch.autograd.grad(result.sum(), leaves) if leaves else ()
        for gradient in gradients:
            assert torch.equal(gradient != 0, MASK)
        found.append([result, *gradients])
    for dirty, clean in zip(*found, strict=True):
        assert_close(dirty, clean, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_only_what_is_trained_gets_a_gradient(name: str):
    arguments = {argument: tensor.requires_grad_() for argument, tensor in CASES[name].arguments().items()}
    result = CASES[name](arguments)
    assert result.requires_grad == bool(CASES[name].trained)
    if CASES[name].trained:
        result.sum().backward()
        assert [argument for argument, leaf in arguments.items() if leaf.grad is not None] == CASES[name].trained


@pytest.mark.parametrize("name", [name for name in CASES if name != "whitened"])
def test_rows_do_not_touch_each_other(name: str):
    arguments = CASES[name].arguments()
    together = CASES[name](arguments)
    assert (together[0] != together[1]).any()
    for row in (slice(0, 1), slice(1, 2)):
        assert_close(CASES[name](arguments, row), together[row], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "argument", "shape"),
    [
        (name, argument, shape)
        for name, each in CASES.items()
        for argument in [*each.tokens, *each.rows]
        for shape in ([[2, 2], [2, 1]] if argument in each.tokens else [[3], [2, 1], [2, 2]])
    ],
)
def test_other_shapes_are_refused(name: str, argument: str, shape: list[int]):
    arguments = {**CASES[name].arguments(), argument: torch.zeros(shape)}
    # Sums over tokens say `values`, and logits over a vocabulary tell the number of rows.
    with pytest.raises(ValueError, match=rf"shapes must agree: .*\b({argument}|values) \[{str(shape)[1:-1]}\]"):
        CASES[name](arguments)
