"""Rows move as Adagrad with one accumulator a row has it, by the loop as by tensors; what has no gradient stays."""

from __future__ import annotations

import pytest
import torch

from trainer import row_adagrad

RATE = 0.1


def _world() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make vectors and squares of 9 rows, of which the padding and four others are used, one without a gradient."""
    draw = torch.Generator().manual_seed(1)
    vector_ID, squares_I = torch.randn(9, 5, generator=draw), torch.rand(9, generator=draw)
    gradient_UD = torch.randn(5, 5, generator=draw)
    gradient_UD[2] = 0
    return vector_ID, squares_I, torch.tensor([0, 2, 3, 5, 8]), gradient_UD


def test_a_step_worked_by_hand() -> None:
    vector_ID, squares_I = torch.zeros(2, 2), torch.tensor([0.0, 7.5])
    # The mean square is (9 + 16) / 2 = 12.5, with 7.5 before 20.
    moved = row_adagrad.move(vector_ID, squares_I, torch.tensor([1]), torch.tensor([[3.0, -4.0]]), RATE)
    assert moved.tolist() == [1]
    assert squares_I.tolist() == [0.0, 20.0]
    torch.testing.assert_close(vector_ID[1], torch.tensor([-0.3, 0.4]) / 20**0.5)


@pytest.mark.parametrize("way", [row_adagrad.move, row_adagrad._by_tensors], ids=["loop", "tensors"])
def test_only_rows_with_a_gradient_move(way: object) -> None:
    vector_ID, squares_I, rows_U, gradient_UD = _world()
    before = vector_ID.clone(), squares_I.clone()
    assert callable(way)
    assert way(vector_ID, squares_I, rows_U, gradient_UD, RATE).tolist() == [2, 5, 8]
    for row in range(9):
        stays = row not in (2, 5, 8)
        assert torch.equal(vector_ID[row], before[0][row]) is stays
        assert torch.equal(squares_I[row], before[1][row]) is stays


def test_both_ways_find_the_same() -> None:
    (one, one_squares, rows_U, gradient_UD), (other, other_squares, _, _) = _world(), _world()
    row_adagrad.move(one, one_squares, rows_U, gradient_UD, RATE)
    row_adagrad._by_tensors(other, other_squares, rows_U, gradient_UD, RATE)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one_squares, other_squares)
