"""The product of one row: natively where there is a GPU, else in the process of the interpreter (`test_kernels.py`)."""

import pytest
import torch

from tests.kernels.test_kernels import DEVICE, needs_kernels
from yafsdp_like.kernels import gemv
from yafsdp_like.kernels.gemv import matmul


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))
    return made.to(dtype).to(DEVICE)


@needs_kernels
@pytest.mark.parametrize(("num_cols", "num_rows"), [(1024, 8), (1536, 9), (40, 3), (2048, 4), (9000, 6), (8704, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_is_multiplied_as_torch_does(
    num_cols: int, num_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over whole blocks and over parts of them; of a weight whose rows lie apart."""
    launched = []
    launch = gemv._launch
    monkeypatch.setattr(gemv, "_launch", lambda *args: (launched.append(1), launch(*args)))
    row, wide = random(1, num_cols, dtype=dtype), random(num_rows, num_cols + 8, dtype=dtype)
    weight = wide[:, :num_cols]
    out = torch.full((1, num_rows + 1), 7.0, dtype=dtype, device=DEVICE)
    matmul(row, weight, out[:, :num_rows])
    expected = row.double() @ weight.double().T
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(out[:, :num_rows].double(), expected, rtol=epsilon, atol=epsilon)
    assert out[0, num_rows] == 7, "written past the end"
    assert launched == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_all_other_products_are_torchs(dtype: torch.dtype, num_rows: int) -> None:
    rows, weight = random(num_rows, 24, dtype=dtype), random(5, 24, dtype=dtype)
    out = torch.empty(num_rows, 5, dtype=dtype, device=DEVICE)
    matmul(rows, weight, out)
    if num_rows == 1 and dtype is torch.bfloat16:
        torch.testing.assert_close(out, rows @ weight.T)
    else:
        assert torch.equal(out, rows @ weight.T)


def test_shapes_that_do_not_fit_are_torchs_error() -> None:
    row = random(1, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        matmul(row, random(5, 9, dtype=torch.bfloat16), torch.empty(1, 5, dtype=torch.bfloat16, device=DEVICE))
