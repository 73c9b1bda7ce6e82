"""AdaRL's rank rule and truncation."""

from __future__ import annotations

import pytest
import torch

from dar.low_rank import energy_rank, factored_svd, truncated


@pytest.mark.parametrize(("energy", "rank"), [(0.8, 2), (0.9, 3), (0.95, 4), (0.98, 5), (0.4, 1), (1.0, 6)])
def test_the_rule_keeps_what_the_paper_keeps(energy: float, rank: int):
    assert energy_rank(torch.tensor([5, 3, 1, 0.5, 0.3, 0.2]), energy) == rank


def test_a_spectrum_of_zeros_keeps_one():
    assert energy_rank(torch.zeros(4), 0.98) == 1


@pytest.mark.parametrize("values", [[], [-1.0], [float("nan")]])
def test_no_spectrum_is_refused(values: list[float]):
    with pytest.raises(ValueError, match="singular_values"):
        energy_rank(torch.tensor(values), 0.5)


@pytest.mark.parametrize("shape", [(7, 4, 9), (3, 5, 9), (9, 5, 3)])
def test_the_truncated_product_errs_by_what_was_cut(shape: tuple[int, int, int]):
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    values = torch.linalg.svdvals((left @ right).double())[: min(shape)]
    torch.testing.assert_close(factored_svd(left, right)[1], values, atol=1e-5, rtol=1e-5)
    for rank in range(1, min(shape) + 1):
        first, second = truncated(left, right, rank)
        assert (first.shape, second.shape) == ((rows, rank), (rank, columns))
        error = torch.linalg.norm((first @ second - left @ right).double())
        torch.testing.assert_close(error, values[rank:].square().sum().sqrt(), atol=1e-5, rtol=1e-5)
        # Each factor carries half of every singular value.
        torch.testing.assert_close(first.T @ first, second @ second.T, atol=1e-5, rtol=1e-5)


def test_a_rank_above_the_factors_is_refused():
    with pytest.raises(ValueError, match="1 to 2"):
        truncated(torch.ones(4, 2), torch.ones(2, 3), 3)
