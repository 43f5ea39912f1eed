"""Routing and grouped products, against an expert after the other in float64: natively on a GPU, else interpreted."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.inference import BF16, F32, TOLERANCES, int32, random
from tests.kernels.test_kernels import DEVICE, RUNS
from tests.kernels.test_quantized import Shape
from yafsdp_like.kernels import experts as experts_module
from yafsdp_like.kernels import routing
from yafsdp_like.kernels.blocks import INTERPRETED
from yafsdp_like.kernels.experts import ExpertWeights, feed_experts
from yafsdp_like.kernels.routing import Visits, route

if TYPE_CHECKING:
    from yafsdp_like.kernels.quantized_matrix import Matrix

NOWHERE = -7  # what tables hold before


def tables(num_tokens: int, num_experts: int, num_per_token: int) -> Visits:
    """Of just the size that is asked for, full of what must not be read."""
    num_visits = num_tokens * num_per_token
    ints = (torch.full((n,), NOWHERE, dtype=torch.int32, device=DEVICE) for n in (num_visits, num_visits))
    weights = torch.full((num_visits,), float("nan"), device=DEVICE)
    starts = torch.full((num_experts + 1,), NOWHERE, dtype=torch.int32, device=DEVICE)
    return Visits(next(ints), weights, next(ints), starts)


def routed(
    num_tokens: int, num_experts: int, num_per_token: int, *, normalize: bool = True, num_padding: int = 0
) -> Visits:
    logits = 2 * random(num_tokens, num_experts, seed=5)
    is_real = [row < num_tokens - num_padding for row in range(num_tokens)]
    slots = int32([(-1, -2 if row % 2 else row)[real] for row, real in enumerate(is_real)])  # below -1: not stored
    visits = tables(num_tokens, num_experts, num_per_token)
    route(logits, num_per_token, normalize, slots, visits)
    return visits


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_per_token"), [(1, 5, 2), (7, 8, 8), (11, 3, 2)])
def test_tokens_visit_the_experts_of_the_largest_probabilities(
    num_tokens: int, num_experts: int, num_per_token: int, normalize: bool
) -> None:
    logits = 2 * random(num_tokens, num_experts, seed=5)
    visits = routed(num_tokens, num_experts, num_per_token, normalize=normalize)
    weights, chosen = logits.double().softmax(-1).topk(num_per_token, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    assert visits.experts.tolist() == chosen.flatten().tolist()
    torch.testing.assert_close(visits.weights, weights.flatten().float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("num_padding", [0, 9])
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_per_token"), [(10, 40, 4), (40, 5, 3)])
def test_visits_are_in_order_of_experts_and_then_of_tokens(
    num_tokens: int, num_experts: int, num_per_token: int, num_padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "_BLOCK_R", 64)  # so that there are several
    visits = routed(num_tokens, num_experts, num_per_token, num_padding=num_padding)
    num_real = (num_tokens - num_padding) * num_per_token
    experts = visits.experts.tolist()
    assert visits.order[:num_real].tolist() == sorted(range(num_real), key=lambda visit: experts[visit])
    expected = [sum(expert < end for expert in experts) for end in range(num_experts + 1)]
    assert visits.starts.tolist() == expected
    assert not visits.weights[num_real:].any()


def test_of_equal_probabilities_the_lower_number_is_chosen() -> None:
    visits = tables(2, 6, 3)
    logits = torch.tensor([[0.0] * 6, [1.0, 2.0, 2.0, 0.0, 2.0, 2.0]], device=DEVICE)
    route(logits, 3, True, int32([0, 1]), visits)
    assert visits.experts.tolist() == [0, 1, 2, 1, 2, 4]


def test_a_token_that_is_not_a_number_visits_experts_that_there_are() -> None:
    """Prevents: an address out of a matrix, where weights or tokens of one request overflow."""
    visits = tables(3, 5, 2)
    logits = random(3, 5)
    logits[1] = float("nan")
    route(logits, 2, True, int32([0, 1, 2]), visits)
    assert all(0 <= expert < 5 for expert in visits.experts.tolist())
    assert sorted(visits.order.tolist()) == list(range(6))
    assert visits.weights[2:4].isnan().all()
    assert not visits.weights[:2].isnan().any()


CASES = [  # tokens, experts, visits of each, D, F, padding
    (1, 4, 2, 48, 40, 0, F32),
    (5, 6, 3, 150, 33, 2, F32),  # tails everywhere
    (35, 2, 2, 20, 70, 3, BF16),  # tiles of 32 rows, two programs an expert
    (70, 1, 1, 24, 40, 0, BF16),  # tiles of 64 rows
]


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_per_token", "dim", "ffn_dim", "num_padding", "dtype"), CASES
)
def test_rows_are_fed_to_their_own_experts(
    num_tokens: int,
    num_experts: int,
    num_per_token: int,
    dim: int,
    ffn_dim: int,
    num_padding: int,
    dtype: torch.dtype,
) -> None:
    visits = routed(num_tokens, num_experts, num_per_token, num_padding=num_padding)
    gate_up = random(2 * num_experts, ffn_dim, dim, seed=1, dtype=dtype) / dim**0.5
    down = random(num_experts, dim, ffn_dim, seed=2, dtype=dtype) / ffn_dim**0.5
    check_fed(random(num_tokens, dim, seed=3, dtype=dtype), ExpertWeights(gate_up, down), visits)


def check_fed(rows: Tensor, weights: ExpertWeights, visits: Visits) -> None:
    """In place, an expert after the other as in float64."""
    (num_tokens, dim), dtype, num_experts, ffn_dim = rows.shape, rows.dtype, visits.num_experts, weights.down.shape[2]
    expected = torch.zeros(num_tokens, dim, dtype=torch.float64, device=DEVICE)
    for visit, expert in enumerate(visits.experts.tolist()):
        if expert < num_experts:
            token = visit // (len(visits.order) // num_tokens)
            gate, up, down = map(
                double, (*(weights.gate_up[i] for i in (expert, num_experts + expert)), weights.down[expert])
            )
            x = rows[token].double()
            fed = down @ (F.silu(gate @ x) * (up @ x))
            expected[token] += visits.weights[visit].double() * fed
    hidden, parts = (
        torch.full((len(visits.order), n), float("nan"), dtype=dtype, device=DEVICE) for n in (ffn_dim, dim)
    )
    feed_experts(rows, weights, visits, hidden, parts, rows)
    tolerance = 2 * TOLERANCES[dtype]  # rounded three times
    torch.testing.assert_close(rows.double(), expected, rtol=tolerance, atol=tolerance)


def double(matrix: Matrix) -> Tensor:
    return (matrix if isinstance(matrix, Tensor) else matrix.dequantized()).double()


QUANTIZED = {  # groups of rows and columns, bits, zeros, an order of columns
    "fp8, a scale a row": Shape(0, 0),
    "fp8, blocks that end early": Shape(0, 0, 32, 128),
    "4 bits, groups": Shape(0, 0, 1, 32, 4),
    "4 bits, groups, zeros, an order for each": Shape(0, 0, 1, 32, 4, zeros=True, ordered=True),
    "4 bits, a scale a row": Shape(0, 0, 1, None, 4),
}


@pytest.mark.parametrize(
    ("name", "num_tokens", "dtype"),
    [*((name, 5, F32) for name in QUANTIZED), ("fp8, blocks that end early", 35, BF16)],
)
def test_quantized_experts_feed_what_their_dequantized_matrices_do(
    name: str, num_tokens: int, dtype: torch.dtype
) -> None:
    dim, ffn_dim, num_experts = 160, 96, 3
    gate_up = replace(QUANTIZED[name], num_rows=ffn_dim, num_columns=dim).stack(2 * num_experts)
    down = replace(QUANTIZED[name], num_rows=dim, num_columns=ffn_dim).stack(num_experts)
    gate_up.scales.mul_(0.02)
    down.scales.mul_(0.02)
    visits = routed(num_tokens, num_experts, 2, num_padding=2)
    check_fed(random(num_tokens, dim, seed=3, dtype=dtype), ExpertWeights(gate_up, down), visits)


def test_experts_may_be_quantized_in_one_of_their_two_stacks() -> None:
    gate_up = replace(QUANTIZED["4 bits, groups"], num_rows=40, num_columns=64).stack(4)
    gate_up.scales.mul_(0.02)
    weights = ExpertWeights(gate_up, random(2, 64, 40) / 6)
    check_fed(random(3, 64), weights, routed(3, 2, 1))


def compiled(kernel: Any, form: tuple[object, ...] | None, tile: Any) -> Any:
    """One of the products for an H200, of 128 experts of 2,048 by 2,048."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"D": 2048, "F": 2048, "E": 128, "S": 8, "FORMAT": form, "WHOLE": True}
    constants |= {"BLOCK_T": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": 128 if form else tile.depth}
    matrices = "*bf16" if form is None else "*u8" if form[3] == 4 else "*fp8e4nv"
    types = dict.fromkeys(("order", "starts", "columns"), "*i32") | dict.fromkeys(("hidden", "parts", "x"), "*bf16")
    types |= {"weights": "*fp32", "scales": "*fp16", "zeros": "*u8", "x_row": "i32"}
    types |= dict.fromkeys(("gate_up", "down"), matrices)
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


FORMS = {"dense": None, "4 bits": (16, 1, 128, 4, True, True), "blocks of fp8": (16, 128, 128, 8, False, False)}


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("name", ["dense", "4 bits"])
def test_products_of_experts_compile_for_tensor_cores(name: str) -> None:
    """Prevents: what the interpreter takes and the compiler does not. Needs no GPU."""
    tile = experts_module._Tile(16, 64, 128, 1, 4, 3)
    assert "mma" in compiled(experts_module._down_kernel, FORMS[name], tile).asm["ptx"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("name", ["4 bits", "blocks of fp8"])
def test_the_largest_tiles_of_quantized_products_stay_in_registers(name: str, tmp_path: Path) -> None:
    """Prevents: tiles that fit where matrices are dense, and spill where each group's sum is apart. Needs no GPU."""
    stack = Shape(32, 32, bits=4).stack(1)
    tiles = experts_module._tiles(1 << 20, ExpertWeights(stack, stack))
    tool = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    for kernel, tile in zip((experts_module._gate_up_kernel, experts_module._down_kernel), tiles, strict=True):
        assert tile.rows == 128
        (tmp_path / "kernel").write_bytes(compiled(kernel, FORMS[name], tile).asm["cubin"])
        told = subprocess.check_output([tool, "--dump-resource-usage", tmp_path / "kernel"], text=True)
        assert "STACK:0 " in told, told


def test_a_step_of_no_tokens_writes_nothing() -> None:
    visits = tables(0, 4, 2)
    route(torch.empty(0, 4, device=DEVICE), 2, True, int32([]), visits)
    rows, wide = torch.empty(0, 8, device=DEVICE), torch.empty(0, 12, device=DEVICE)
    feed_experts(rows, ExpertWeights(random(8, 12, 8), random(4, 8, 12)), visits, wide, rows, rows)


def test_shapes_that_do_not_fit_are_refused() -> None:
    visits, rows = routed(3, 4, 2), random(3, 8)
    with pytest.raises(ValueError, match="expected tables of 9 visits"):
        route(random(3, 4), 3, True, int32([0, 1, 2]), visits)
    with pytest.raises(ValueError, match="3 slots, found 2 and"):
        route(random(3, 4), 2, True, int32([0, 1]), visits)
    weights = ExpertWeights(random(8, 12, 8), random(4, 8, 12))
    with pytest.raises(ValueError, match="expected gate_up, down, hidden and parts"):
        feed_experts(rows, weights, visits, random(6, 11), random(6, 8), rows)


@pytest.mark.skipif(not RUNS, reason="kernels run on a GPU or in the interpreter's own process")
def test_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a reference that is compared with itself."""

    def fail(*_: object) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(routing, "route_reference", fail)
    monkeypatch.setattr(experts_module, "feed_experts_reference", fail)
    visits, rows = routed(2, 4, 2), random(2, 8)
    feed_experts(rows, ExpertWeights(random(8, 12, 8), random(4, 8, 12)), visits, random(4, 12), random(4, 8), rows)
