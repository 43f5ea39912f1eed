"""What a plan needs to know of a parameter, by the policy of its unit."""

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from yafsdp_like.memory.layout import RowShards
from yafsdp_like.shard.spec import unit_spec

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("as_grad", "param_dtype", "reduce_dtype", "grad_dtype", "expected"),
    [
        (False, BF16, None, None, (BF16, F32)),
        (True, BF16, None, None, (F32, F32)),
        (True, BF16, None, BF16, (BF16, BF16)),
        (True, BF16, F16, None, (F16, F32)),
        (False, None, None, None, (F32, F32)),
    ],
)
def test_without_a_reduce_dtype_gradients_are_reduced_as_the_installed_torch_does(
    as_grad: bool,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    grad_dtype: torch.dtype | None,
    expected: tuple[torch.dtype, torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents: other bits than FSDP2's of the same torch. Literal: reduced in, and `.grad` in, for an fp32 master."""
    monkeypatch.setattr(unit_spec, "REDUCES_AS_GRAD", as_grad)
    policy = unit_spec.UnitPolicy(MixedPrecisionPolicy(param_dtype, reduce_dtype), None, grad_dtype=grad_dtype)
    spec = unit_spec.param_spec("weight", RowShards((4, 2), 2), F32, policy)
    assert (spec.reduce_dtype, spec.grad_dtype) == expected
    integers = unit_spec.param_spec("table", RowShards((4, 2), 2), torch.int64, policy)
    assert integers.reduce_dtype == torch.int64


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.11.0+cu128", False),
        ("2.14.1", False),
        ("2.15.0a0+git1", True),
        ("2.15.0.dev20260901", True),
        ("2.15.0", True),
        ("3.0.0", True),
    ],
)
def test_the_meaning_changes_with_torch_2_15_and_its_nightlies(version: str, expected: bool) -> None:
    """Prevents: torch's own comparison, by which a nightly of 2.15 comes before 2.15."""
    assert unit_spec.reduces_as_grad(version) == expected
