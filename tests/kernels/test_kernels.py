"""Kernels against their plain torch references, and the references against torch and against numbers by hand.

Kernels run natively where there is a GPU. Elsewhere one test starts this file and `test_optim.py` again in a process
of their own, in which Triton interprets them: it decides that once, when it is imported.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from yafsdp_like.kernels import adamw, blocks, reduce
from yafsdp_like.kernels.adamw import AdamWStep, AdamWTable, AdamWTensors, adamw_reference, rate_row
from yafsdp_like.kernels.blocks import INTERPRETED, BlockTable
from yafsdp_like.kernels.reduce import ReduceTable, reduce_reference
from yafsdp_like.kernels.split import join, split

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
RUNS = blocks.runs_on(DEVICE)
needs_kernels = pytest.mark.skipif(not RUNS, reason="kernels run on a GPU or in the interpreter's own process")
NUMELS = [5, 0, 2 * reduce.BLOCK, reduce.BLOCK + 3, 1]  # tails, an empty segment, whole blocks


def run_python(*arguments: str, **environment: str) -> None:
    """Runs Python on `arguments`; fails with its output if it fails."""
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernels_equal_their_references_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    files = ("kernels/test_kernels.py", "kernels/test_formats.py", "kernels/test_gemv.py", "kernels/test_lora.py")
    files += ("kernels/test_quantized.py", "kernels/test_experts.py")
    files += ("optim/test_optim.py", "optim/test_clipping.py")
    run_python("-m", "pytest", "-q", *(f"tests/{file}" for file in files), TRITON_INTERPRET="1")


@pytest.mark.skipif(INTERPRETED, reason="says nothing of the interpreter")
def test_without_triton_references_do_the_work() -> None:
    """`None` in `sys.modules` makes an import fail as if nothing were installed."""
    run_python(
        "-c",
        """
import sys
sys.modules["triton"] = None
import torch
from yafsdp_like.kernels.reduce import ReduceTable
from yafsdp_like.optim import AdamW
output, inputs = torch.zeros(3), [[torch.ones(3)], [torch.full((3,), 2.0)]]
ReduceTable([output], inputs).reduce(0.5, torch.bfloat16, False)
assert output.tolist() == [1.5] * 3
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
AdamW([param], lr=0.5, weight_decay=0.0).step()
assert torch.allclose(param, torch.full((3,), 0.5))
""",
    )


# --- blocks ---


def test_blocks_are_listed_by_segment_and_number() -> None:
    table = BlockTable.of([5, 0, 8, 1], 4, torch.device("cpu"))
    assert table.blocks.tolist() == [[0, 0], [0, 1], [2, 0], [2, 1], [3, 0]]
    assert table.numels.tolist() == [5, 0, 8, 1]


def test_no_segments_and_empty_segments_have_no_blocks() -> None:
    assert BlockTable.of([], 4, torch.device("cpu")).num_blocks == 0
    assert BlockTable.of([0, 0], 4, torch.device("cpu")).num_blocks == 0


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_compiled_kernels_move_sixteen_bytes_at_once() -> None:
    """Prevents: hints that do not reach the loads, which are then an element each. Compiles without a GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tl = triton.language
    pointers = {"blocks": "*i32", "numels": "*i64", "outputs": "*i64", "addresses": "*i64", "scale": "fp32"}
    constants = {"OUTPUT": tl.float32, "INPUT": tl.bfloat16, "WIRE": tl.bfloat16, "ACCUMULATE": True}
    constants |= {"WORLD_SIZE": 2, "BLOCK": reduce.BLOCK, "VECTOR": 8}
    kernel = reduce._reduce_kernel
    source = ASTSource(
        fn=kernel,
        signature=pointers | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": reduce.NUM_WARPS, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    per_thread = reduce.BLOCK // (32 * reduce.NUM_WARPS)
    num_loads = 2 * per_thread // 8 + per_thread // 4  # two ranks in bfloat16, the output in float32
    assert ptx.count("ld.global.v4.b32") == num_loads
    assert ptx.count("st.global.v4.b32") == per_thread // 4
    assert "fma" not in ptx


# --- reduce ---


def spread(numels: Sequence[int], dtype: torch.dtype, seed: int, lead: int = 0, guard: int = 0) -> list[torch.Tensor]:
    """Random flat tensors in one region, each at a multiple of 256 bytes plus `lead` elements, `guard` after it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for numel in numels:
        region = torch.randn(lead + numel + guard, generator=generator).to(dtype).to(DEVICE)
        tensors.append(region[lead : lead + numel])
    return tensors


def same_bits(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))


def reduced(inputs: Sequence[Sequence[float]], scale: float, wire: torch.dtype, start: float | None = None) -> float:
    """What one element becomes whose ranks' values are given; added to `start` if that is given."""
    output = torch.full((1,), start or 0.0)
    reduce_reference([output], [[torch.tensor(x)] for x in inputs], scale, wire, start is not None)
    return output.item()


def test_ranks_are_summed_in_order() -> None:
    """In float32 100000000 + 1 is 100000000."""
    assert reduced([[1e8], [1.0], [-1e8]], 1.0, torch.float32) == 0.0
    assert reduced([[1e8], [-1e8], [1.0]], 1.0, torch.float32) == 1.0


def test_the_scaled_sum_is_rounded_to_the_wire_dtype_before_it_is_added() -> None:
    ninth = 1 + 2**-9  # lies between two bfloat16 numbers, nearer to 1
    assert reduced([[ninth], [ninth]], 0.5, torch.float32, start=1.0) == 2 + 2**-9
    assert reduced([[ninth], [ninth]], 0.5, torch.bfloat16, start=1.0) == 2.0


def test_the_product_is_rounded_before_it_is_added() -> None:
    """A fused multiply-add would leave 2**-24."""
    product = 1 + 2**-12
    assert reduced([[product]], product, torch.float32, start=-(1 + 2**-11)) == 0.0
    assert product * product - (1 + 2**-11) == 2**-24


def test_two_ranks_in_bfloat16_sum_as_bfloat16_tensors_do() -> None:
    a, b = (spread([64], torch.bfloat16, seed) for seed in (0, 1))
    output = [torch.empty(64, dtype=torch.bfloat16, device=DEVICE)]
    reduce_reference(output, [a, b], 1.0, torch.bfloat16, False)
    assert same_bits(output, [a[0] + b[0]])


def test_inputs_keep_their_values() -> None:
    """Prevents: a sum in place over float32 inputs, which `float()` does not copy."""
    (chunk,) = spread([8], torch.float32, 0)
    before, output = chunk.clone(), torch.zeros(8, device=DEVICE)
    reduce_reference([output], [[chunk], [chunk]], 0.5, torch.float32, True)
    assert same_bits([chunk], [before])


REDUCTIONS = [  # output, input, wire
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float16, torch.float16, torch.float16),
]


@needs_kernels
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("output_dtype", "input_dtype", "wire_dtype"), REDUCTIONS)
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_the_reduction_has_the_bits_of_its_reference(
    world_size: int, output_dtype: torch.dtype, input_dtype: torch.dtype, wire_dtype: torch.dtype, accumulate: bool
) -> None:
    inputs = [spread(NUMELS, input_dtype, seed=1 + rank) for rank in range(world_size)]
    outputs = spread(NUMELS, output_dtype, seed=0)
    expected = [output.clone() for output in outputs]
    reduce_reference(expected, inputs, 1 / 3, wire_dtype, accumulate)
    table = ReduceTable(outputs, inputs)
    table.reduce(1 / 3, wire_dtype, accumulate)
    assert same_bits(outputs, expected)


@needs_kernels
def test_a_table_serves_many_reductions() -> None:
    inputs = [spread(NUMELS, torch.bfloat16, seed=1 + rank) for rank in range(2)]
    outputs = spread(NUMELS, torch.float32, seed=0)
    expected = [output.clone() for output in outputs]
    table = ReduceTable(outputs, inputs)
    for accumulate in (False, True, True):
        for chunk in (chunk for chunks in inputs for chunk in chunks):
            chunk.mul_(-1.5)
        reduce_reference(expected, inputs, 0.5, torch.bfloat16, accumulate)
        table.reduce(0.5, torch.bfloat16, accumulate)
    assert same_bits(outputs, expected)


@needs_kernels
def test_misaligned_chunks_are_reduced_and_nothing_past_them_is_written() -> None:
    """Rank r's chunk of a parameter starts at r chunks from an aligned address, which may be anywhere."""
    inputs = [spread(NUMELS, torch.bfloat16, seed=1 + rank, lead=rank, guard=4) for rank in range(3)]
    regions = [torch.full((1 + numel + 4,), 7.0, device=DEVICE) for numel in NUMELS]
    outputs = [region[1:-4] for region in regions]
    expected = [region.clone() for region in regions]
    reduce_reference([region[1:-4] for region in expected], inputs, 0.25, torch.float32, False)
    ReduceTable(outputs, inputs).reduce(0.25, torch.float32, False)
    assert same_bits(regions, expected)


def test_outputs_are_found_where_they_are_now() -> None:
    inputs = [spread(NUMELS, torch.bfloat16, seed=1 + rank) for rank in range(2)]
    outputs = spread(NUMELS, torch.float32, seed=0)
    table = ReduceTable(outputs, inputs)
    for output in outputs:
        output.set_(torch.zeros_like(output))
    expected = [output.clone() for output in outputs]
    reduce_reference(expected, inputs, 0.5, torch.bfloat16, False)
    table.find_outputs()
    table.reduce(0.5, torch.bfloat16, False)
    assert same_bits(outputs, expected)


def test_a_part_of_the_outputs_is_reduced() -> None:
    inputs = [spread([4, 3], torch.bfloat16, seed=1 + rank) for rank in range(2)]
    outputs = [torch.zeros(9, device=DEVICE), torch.zeros(3, device=DEVICE)]
    expected = [output.clone() for output in outputs]
    reduce_reference([expected[0][5:], expected[1]], inputs, 0.5, torch.bfloat16, False)
    ReduceTable(outputs, inputs, [5, 0]).reduce(0.5, torch.bfloat16, False)
    assert same_bits(outputs, expected)


def test_a_unit_without_elements_is_reduced_to_nothing() -> None:
    empty = torch.empty(0, device=DEVICE)
    ReduceTable([empty], [[empty], [empty]]).reduce(0.5, torch.float32, False)


@pytest.mark.parametrize(
    ("outputs", "inputs", "message"),
    [
        ([], [[]], "found 0 outputs"),
        ([torch.zeros(3)], [], "0 ranks"),
        ([torch.zeros(3)], [[torch.zeros(3)], [torch.zeros(4)]], r"rank 1: expected \[3\] elements, found \[4\]"),
        ([torch.zeros(3)], [[torch.zeros(3), torch.zeros(3)]], r"rank 0: expected \[3\] elements, found \[3, 3\]"),
        ([torch.zeros(3)], [[torch.zeros(3)], [torch.zeros(3).half()]], "expected torch.float32 on cpu"),
        ([torch.zeros(1, 3)], [[torch.zeros(3)]], "outputs, parameter 0: expected a flat contiguous tensor"),
        ([torch.zeros(3)], [[torch.zeros(6)[::2]]], "rank 0, parameter 0: expected a flat contiguous tensor"),
        ([torch.zeros(3).double()], [[torch.zeros(3)]], "found torch.float64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ReduceTable(outputs, inputs)


# --- AdamW ---

ADAMW_NUMELS = [5, 0, 2 * adamw.BLOCK, adamw.BLOCK + 3, 1]
STEP = AdamWStep(step=3, beta1=0.9, beta2=0.95, eps=1e-8, gradient_scale=0.5)
RATES = torch.tensor([rate_row(1e-2, 0.1), rate_row(3e-3, 0.0)], device=DEVICE)

TOLERANCES = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # float32: 4 units in last place

ADAMW_DTYPES = [  # main, grad, states, compute
    (torch.float32, torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16, None),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float16),
    (torch.float32, torch.float32, torch.float32, None),
]


def adamw_params(
    numels: Sequence[int],
    main: torch.dtype,
    grad: torch.dtype,
    state: torch.dtype,
    compute: torch.dtype | None,
    lead: int = 0,
) -> list[AdamWTensors]:
    copies = [None] * len(numels) if compute is None else spread(numels, compute, 4, lead)
    return [
        AdamWTensors(main, grad, exp_avg, exp_avg_sq.abs_(), compute, k % 2)
        for k, (main, grad, exp_avg, exp_avg_sq, compute) in enumerate(
            zip(
                spread(numels, main, 0, lead),
                spread(numels, grad, 1, lead),
                spread(numels, state, 2, lead),
                spread(numels, state, 3, lead),
                copies,
                strict=True,
            )
        )
    ]


def cloned(params: Sequence[AdamWTensors]) -> list[AdamWTensors]:
    return [AdamWTensors(*(None if tensor is None else tensor.clone() for tensor in p[:5]), *p[5:]) for p in params]


def assert_updated_alike(found: Sequence[AdamWTensors], expected: Sequence[AdamWTensors]) -> None:
    """States in every bit; what depends on a square root, which torch rounds wrongly on a CPU, nearly."""
    for a, b in zip(found, expected, strict=True):
        assert same_bits([a.grad, a.exp_avg, a.exp_avg_sq], [b.grad, b.exp_avg, b.exp_avg_sq])
        for updated, reference in ((a.main, b.main), (a.compute, b.compute)):
            if updated is not None and reference is not None:
                rtol = TOLERANCES[updated.dtype]
                torch.testing.assert_close(updated, reference, rtol=rtol, atol=rtol / 16)


@needs_kernels
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("dtypes", ADAMW_DTYPES)
def test_the_update_is_that_of_its_reference(dtypes: Sequence[torch.dtype], lead: int) -> None:
    params = adamw_params(ADAMW_NUMELS, *dtypes, lead=lead)
    expected, table = cloned(params), AdamWTable()
    for number in (1, 2):
        step = AdamWStep(number, 0.9, 0.95, 1e-8, gradient_scale=0.5)
        adamw_reference(expected, RATES, step)
        table.update(params, RATES, step)
    assert_updated_alike(params, expected)


@needs_kernels
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("dtypes", ADAMW_DTYPES)
def test_clipping_in_an_update_has_the_bits_of_clipping_before(dtypes: Sequence[torch.dtype], lead: int) -> None:
    """Prevents: a product that is not rounded, to float32 or to the gradient's dtype, before it enters a sum."""
    params = adamw_params(ADAMW_NUMELS, *dtypes, lead=lead)
    clipped, tables = cloned(params), (AdamWTable(), AdamWTable())
    factor = torch.tensor(0.3, device=DEVICE).to(dtypes[1])
    for p in clipped:
        p.grad.mul_(factor)
    before = [p.grad.clone() for p in params]
    for number in (1, 2):
        step = AdamWStep(number, 0.9, 0.95, 1e-8, gradient_scale=0.7)
        tables[0].update(params, RATES, step, factor)
        tables[1].update(clipped, RATES, step)
    assert same_bits([p.grad for p in params], before)
    for found, expected in zip(params, clipped, strict=True):
        assert same_bits([found.main, *found[2:4]], [expected.main, *expected[2:4]])


@needs_kernels
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_a_master_in_two_halves_has_the_bits_of_one_in_fp32(state: torch.dtype, lead: int) -> None:
    whole = adamw_params(ADAMW_NUMELS, torch.float32, torch.float32, state, None, lead)
    halves = []
    for p, low in zip(whole, spread(ADAMW_NUMELS, torch.int16, 0, lead), strict=True):
        high = spread([p.main.numel()], torch.bfloat16, 0, lead)[0]
        for half, values in zip((high, low), split(p.main), strict=True):
            half.copy_(values)
        halves.append(cloned([p])[0]._replace(main=high, remainder=low))
    tables = AdamWTable(), AdamWTable()
    for number in (1, 2, 3):
        step = AdamWStep(number, 0.9, 0.95, 1e-8, seed=5)
        for table, params in zip(tables, (whole, halves), strict=True):
            table.update(params, RATES, step)
    for p, q in zip(whole, halves, strict=True):
        assert q.remainder is not None
        assert same_bits([p.main, p.exp_avg, p.exp_avg_sq], [join(q.main, q.remainder), q.exp_avg, q.exp_avg_sq])
        assert same_bits([split(p.main)[0]], [q.main])


@needs_kernels
def test_a_table_follows_tensors_to_new_addresses_and_sizes() -> None:
    table, dtypes = AdamWTable(), ADAMW_DTYPES[0]
    first = adamw_params([7, 5], *dtypes)
    for params in (first, cloned(first), adamw_params([7, 4, 9], *dtypes), first):
        expected = cloned(params)
        adamw_reference(expected, RATES, STEP)
        table.update(params, RATES, STEP)
        assert_updated_alike(params, expected)


def test_the_reference_gives_the_numbers_of_the_formula() -> None:
    """After one step from zero states the corrected moments are the gradient and its square."""
    param = AdamWTensors(*(torch.zeros(1, device=DEVICE) for _ in range(4)), None, 0)
    param.main.fill_(2.0)
    param.grad.fill_(6.0)
    rates = torch.tensor([rate_row(0.25, 0.5)], device=DEVICE)
    adamw_reference([param], rates, AdamWStep(1, 0.9, 0.99, eps=1.0, gradient_scale=0.5))
    found = torch.cat([param.main, param.exp_avg, param.exp_avg_sq]).cpu()
    torch.testing.assert_close(found, torch.tensor([2 * 0.875 - 0.25 * 3 / (3 + 1), 0.3, 0.09]))


def test_the_compute_copy_is_the_new_value_as_stored() -> None:
    """Rounded twice where the parameter itself is rounded: as if it were cast afterwards."""
    params = adamw_params([64], torch.bfloat16, torch.bfloat16, torch.float32, torch.float16)
    adamw_reference(params, RATES, STEP)
    assert params[0].compute is not None
    assert same_bits([params[0].compute], [params[0].main.half()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(4)}, "expected contiguous tensors of 3 elements, found shape"),
        ({"compute": torch.zeros(6)[::2]}, r"strides \(2,\)"),
        ({"exp_avg": torch.zeros(3).half()}, "expected dtypes"),
        ({"main": torch.zeros(3).double()}, "found torch.float64"),
    ],
)
def test_states_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    param = AdamWTensors(*(torch.zeros(3) for _ in range(5)), 0)
    with pytest.raises(ValueError, match=message):
        AdamWTable().update([param._replace(**change)], RATES.cpu(), STEP)
