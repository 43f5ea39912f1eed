"""Norms and activations for serving against their references."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.inference import BF16, F16, F32, ROUNDED_ONCE, TOLERANCES, assert_near, random
from tests.kernels.test_kernels import DEVICE, needs_kernels
from yafsdp_like.kernels import activation
from yafsdp_like.kernels.activation import swiglu, swiglu_reference
from yafsdp_like.kernels.norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_norm_of_the_reference_is_torchs(dtype: torch.dtype) -> None:
    x, weight, residual = (random(*shape, seed=s, dtype=dtype) for s, shape in enumerate([(3, 40), (40,), (3, 40)]))
    out, total = torch.empty_like(x), x + residual
    rms_norm_reference(x, weight, 1e-5, out)
    assert_near(out, F.rms_norm(x, (40,), weight, 1e-5), ROUNDED_ONCE)
    rms_norm_reference(x, weight, 1e-5, out, residual)
    assert torch.equal(residual, total)
    assert_near(out, F.rms_norm(total, (40,), weight, 1e-5), ROUNDED_ONCE)


@needs_kernels
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dim", [1, 576, 1024])
def test_rows_are_normed_as_by_the_reference(dim: int, dtype: torch.dtype, added: bool) -> None:
    x, weight = random(3, dim + 5, dtype=dtype)[:, :dim], random(dim, seed=1, dtype=dtype)
    residual = random(3, dim, seed=2, dtype=dtype) if added else None
    expected_residual = None if residual is None else residual.clone()
    region = torch.full((3, dim + 1), 7.0, dtype=dtype, device=DEVICE)
    out, expected = region[:, :dim], torch.empty_like(x)
    rms_norm_reference(x, weight, 1e-5, expected, expected_residual)
    rms_norm(x, weight, 1e-5, out, residual)
    assert_near(out, expected, ROUNDED_ONCE)
    assert (region[:, dim] == 7).all()
    if residual is not None and expected_residual is not None:
        assert torch.equal(residual, expected_residual)


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("num_cols", [3, activation.BLOCK + 8])
def test_swiglu_is_that_of_its_reference_and_may_overwrite_its_gate(num_cols: int, dtype: torch.dtype) -> None:
    row = random(3, 2 * num_cols, dtype=dtype) * 4
    gate, up = row.chunk(2, dim=1)
    expected, before = torch.empty_like(gate), up.clone()
    swiglu_reference(gate, up, expected)
    assert_near(expected, F.silu(gate) * up, TOLERANCES)
    swiglu(gate, up, gate)
    assert_near(gate, expected, ROUNDED_ONCE)
    assert torch.equal(up, before)


def test_rows_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"out: expected dense rows \(3, 4\)"):
        rms_norm(x, torch.ones(4), 1e-5, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"weight \(3,\)"):
        rms_norm(x, torch.ones(3), 1e-5, x)
    with pytest.raises(ValueError, match="up: expected dense rows"):
        swiglu(x, torch.zeros(4, 3).T, x)
