"""Products of many rows in one call or in pieces, whichever was measured to be faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from yafsdp_like.inference.engine import products
from yafsdp_like.inference.engine.products import PIECE, choose_pieces, multiply

if TYPE_CHECKING:
    from collections.abc import Callable

NOTHING = torch.empty(0, dtype=torch.uint8)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of `matmul`."""
    found: list[int] = []

    def matmul(rows: Tensor, weight: Tensor, out: Tensor) -> None:
        found.append(len(rows))
        torch.mm(rows, weight.t(), out=out)

    monkeypatch.setattr(products, "matmul", matmul)
    monkeypatch.setattr(products, "_in_pieces", {})
    return found


def operands(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows are a part of wider ones, as a gate is."""
    rows, weight = torch.randn(num_rows, 12)[:, :6], torch.randn(5, 6)
    return rows, weight, torch.full((num_rows, 5), torch.nan)


def seconds(*measured: float) -> Callable[[Callable[[], None]], float]:
    left = list(measured)

    def measure(work: Callable[[], None]) -> float:
        work()
        return left.pop(0)

    return measure


@pytest.mark.parametrize(("whole", "pieces", "expected"), [(1.0, 0.96, [1024, 1024, 100]), (1.0, 0.98, [2148])])
def test_pieces_are_taken_where_they_gain_more_than_noise(
    calls: list[int], whole: float, pieces: float, expected: list[int]
) -> None:
    rows, weight, out = operands(2148)
    choose_pieces(rows, weight, out, seconds(whole, pieces))
    assert calls == [2148, 1024, 1024, 100]
    calls.clear()
    multiply(rows, weight, out.fill_(torch.nan), NOTHING)
    assert calls == expected
    torch.testing.assert_close(out, rows @ weight.T)


def test_a_shape_is_measured_once_and_others_are_not_changed_by_it(calls: list[int]) -> None:
    choose_pieces(*operands(2048), seconds(2.0, 1.0))
    choose_pieces(*operands(2048), seconds())  # would fail
    for num_rows in (PIECE, 8193):  # too few to be cut, and too many to be measured
        choose_pieces(*operands(num_rows), seconds())
    calls.clear()
    for num_rows in (2048, 2049, PIECE):
        multiply(*operands(num_rows), NOTHING)
    assert calls == [1024, 1024, 2049, PIECE]
