"""Stored formats of moments: what is rounded to what, how likely, and that the kernel gives the reference's bits.

Runs natively where there is a GPU, and in Triton's interpreter where `test_kernels.py` starts it.
"""

import math
from collections.abc import Sequence

import pytest
import torch

from tests.kernels.test_kernels import DEVICE, RATES, adamw_params, cloned, needs_kernels, same_bits
from yafsdp_like.kernels import adamw
from yafsdp_like.kernels.adamw import AdamWStep, AdamWTable, AdamWTensors, adamw_reference
from yafsdp_like.kernels.blocks import INTERPRETED
from yafsdp_like.kernels.formats import (
    BLOCK_NUMEL,
    TO_NEAREST,
    RandomKey,
    blocks_nbytes,
    from_blocks,
    random_bits,
    to_bfloat16,
    to_blocks,
)

SIGNED = [True, False]
NUM_DRAWS = 1 << 16


def noise_of(numel: int, step: int = 1) -> torch.Tensor:
    return random_bits(RandomKey.of(7, step), 3, 0, numel, DEVICE) & 0xFFFF


def spread_widely(numel: int, signed: bool, octaves: float = 24.0) -> torch.Tensor:
    """Random magnitudes over so many octaves, of either sign if `signed`."""
    generator = torch.Generator().manual_seed(5)
    values = torch.exp2(-octaves * torch.rand(numel, generator=generator))
    signs = torch.randint(0, 2, (numel,), generator=generator) * 2 - 1 if signed else 1
    return (values * signs).to(DEVICE)


# --- random bits ---


def test_random_bits_depend_on_the_place_in_the_whole_parameter_alone() -> None:
    key = RandomKey.of(0, 5)
    whole = random_bits(key, 2, 0, 1000, DEVICE)
    assert torch.equal(random_bits(key, 2, 300, 700, DEVICE), whole[300:])
    far = 3 * 2**32 + 5
    assert torch.equal(random_bits(key, 2, far - 4, 8, DEVICE)[4:], random_bits(key, 2, far, 4, DEVICE))
    assert not torch.equal(random_bits(key, 2, far, 1000, DEVICE), random_bits(key, 2, 5, 1000, DEVICE))


@pytest.mark.parametrize(("seed", "step", "number"), [(1, 5, 2), (0, 6, 2), (0, 5, 3), (1 << 32, 5, 2), (-1, 5, 2)])
def test_other_seeds_steps_and_parameters_have_other_bits(seed: int, step: int, number: int) -> None:
    here = random_bits(RandomKey.of(0, 5), 2, 0, NUM_DRAWS, DEVICE)
    there = random_bits(RandomKey.of(seed, step), number, 0, NUM_DRAWS, DEVICE)
    assert are_independent(here, there)


def are_independent(here: torch.Tensor, there: torch.Tensor) -> bool:
    """Half of the bits differ, each in half of the words."""
    differing = (here ^ there)[:, None] >> torch.arange(32, device=DEVICE) & 1
    deviation = 0.5 / math.sqrt(NUM_DRAWS)
    return bool((differing.float().mean(0) - 0.5).abs().max() < 5 * deviation)


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 4096, 1 << 31, 1 << 32, 3 << 33])
def test_elements_at_any_distance_have_other_bits(distance: int) -> None:
    """Prevents: the words of elements 2**32 apart, which differed in few bits while the upper ones were only added."""
    key = RandomKey.of(0, 5)
    assert are_independent(*(random_bits(key, 2, start, NUM_DRAWS, DEVICE) for start in (7, 7 + distance)))


def test_random_bits_are_as_often_set_as_not_and_independent_of_each_other() -> None:
    words = random_bits(RandomKey.of(0, 1), 0, 0, NUM_DRAWS, DEVICE)
    signs = ((words[:, None] >> torch.arange(32, device=DEVICE) & 1) * 2 - 1).float()
    deviation = 1 / math.sqrt(NUM_DRAWS)
    assert signs.mean(0).abs().max() < 5 * deviation
    products = signs.T @ signs / NUM_DRAWS - torch.eye(32, device=DEVICE)
    neighbours = signs[1:].T @ signs[:-1] / NUM_DRAWS
    assert products.abs().max() < 5 * deviation and neighbours.abs().max() < 5 * deviation


# --- bfloat16 ---


def test_the_expectation_of_a_stochastically_rounded_value_is_the_value() -> None:
    """A quarter of a unit above 1: rounded up in a quarter of the draws."""
    unit = 2.0**-7
    values = torch.full((NUM_DRAWS,), 1 + unit / 4, device=DEVICE)
    for sign in (1, -1):
        rounded = to_bfloat16(sign * values, noise_of(NUM_DRAWS)).float() * sign
        assert set(rounded.unique().tolist()) == {1.0, 1 + unit}
        assert abs((rounded == 1 + unit).float().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / NUM_DRAWS)


def test_what_bfloat16_holds_keeps_its_bits() -> None:
    values = torch.randn(4096, device=DEVICE).bfloat16()
    values[:5] = torch.tensor([0.0, -0.0, math.inf, -math.inf, 2.0**-133])
    for noise in (0xFFFF, noise_of(4096)):
        assert same_bits([to_bfloat16(values.float(), torch.as_tensor(noise, device=DEVICE))], [values])
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32, device=DEVICE).view(torch.float32)
    assert to_bfloat16(nan, torch.tensor(0xFFFF, device=DEVICE)).isnan().all()


# --- 8 bit by blocks ---


@pytest.mark.parametrize("signed", SIGNED)
def test_blocks_lose_at_most_half_a_unit_of_their_mantissa(signed: bool) -> None:
    values = spread_widely(64 * BLOCK_NUMEL, signed, octaves=13.0)
    stored = to_blocks(values, TO_NEAREST, signed)
    assert stored.dtype == torch.uint8 and stored.numel() == blocks_nbytes(values.numel())
    torch.testing.assert_close(from_blocks(stored, signed), values, rtol=2.0 ** (-4 if signed else -5), atol=0)


@pytest.mark.parametrize("signed", SIGNED)
def test_what_was_decoded_is_encoded_again_without_loss(signed: bool) -> None:
    """In bfloat16 too, as checkpoints have it; whatever the noise."""
    values = spread_widely(64 * BLOCK_NUMEL, signed)
    decoded = from_blocks(to_blocks(values, noise_of(values.numel()), signed), signed)
    assert torch.equal(decoded.bfloat16().float(), decoded)
    for noise in (0, 0xFFFF, TO_NEAREST):
        assert torch.equal(from_blocks(to_blocks(decoded, noise, signed), signed), decoded)


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("value", [1 - 2**-10, 0.7, 2.0**-10 * 1.3, 2.0**-16 * 1.3])
def test_the_expectation_of_a_code_is_the_value(signed: bool, value: float) -> None:
    """Beside a largest element of 1; where the first moment's codes end too, which the second's are coarser for."""
    values = torch.full((NUM_DRAWS,), value, device=DEVICE)
    values[::BLOCK_NUMEL] = 1.0
    drawn = from_blocks(to_blocks(values, noise_of(NUM_DRAWS), signed), signed)
    drawn = drawn.view(-1, BLOCK_NUMEL)[:, 1:].double()
    deviation = drawn.std().item() / math.sqrt(drawn.numel())
    assert len(drawn.unique()) == 2
    assert abs(drawn.mean().item() - value) < 5 * deviation


def test_the_largest_element_is_never_cut_off() -> None:
    """Prevents: a value next to the power of two above it, which would be rounded up beyond all codes."""
    values = torch.full((BLOCK_NUMEL,), 1.99, device=DEVICE)
    for signed in SIGNED:
        assert from_blocks(to_blocks(values, 0xFFFF, signed), signed).tolist() == [2.0] * BLOCK_NUMEL


def test_a_second_moment_above_zero_is_not_stored_as_zero() -> None:
    values = torch.full((BLOCK_NUMEL,), 1e-12, device=DEVICE)
    values[:2] = torch.tensor([1.0, 0.0])
    decoded = from_blocks(to_blocks(values, 0, signed=False), signed=False)
    assert decoded[1] == 0 and (decoded[2:] == 2.0**-18).all()


@pytest.mark.parametrize("signed", SIGNED)
def test_zeros_tiny_values_and_what_is_not_finite(signed: bool) -> None:
    zeros, tiny, infinite, nan = torch.zeros(4, BLOCK_NUMEL, device=DEVICE)
    tiny += 2.0**-110
    infinite[0], nan[3] = math.inf, math.nan
    infinite[1:] = 1.0
    stored = to_blocks(torch.cat((zeros, tiny, infinite, nan)), TO_NEAREST, signed)
    found = from_blocks(stored, signed).view(4, BLOCK_NUMEL)
    assert (found[:2] == 0).all() and not found[2, 0].isfinite() and not found[3, 3].isfinite()


def test_no_elements_are_no_blocks() -> None:
    assert from_blocks(to_blocks(torch.zeros(0, device=DEVICE), 0, signed=True), signed=True).numel() == 0


# --- the kernel ---

NUMELS = [2 * adamw.BLOCK, 0, BLOCK_NUMEL, adamw.BLOCK + 3 * BLOCK_NUMEL]
KERNEL_DTYPES = [(torch.float32, torch.bfloat16), (torch.bfloat16, None)]  # gradient, compute


def with_formats(params: Sequence[AdamWTensors], int8: bool) -> list[AdamWTensors]:
    """Moments of `params`, in float32, stored in a narrow format; the last parameter has its last element at 2**32."""
    found = []
    for k, p in enumerate(params):
        if int8:
            moments = to_blocks(p.exp_avg, TO_NEAREST, True), to_blocks(p.exp_avg_sq, TO_NEAREST, False)
        else:
            moments = p.exp_avg.bfloat16(), p.exp_avg_sq.bfloat16()
        start = 2**32 - p.main.numel() + 1 if k == len(params) - 1 else 3 * k
        found.append(p._replace(exp_avg=moments[0], exp_avg_sq=moments[1], number=k, start=start))
    return found


@needs_kernels
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("dtypes", KERNEL_DTYPES)
@pytest.mark.parametrize("int8", [False, True])
def test_the_kernel_stores_the_bits_of_its_reference(
    int8: bool, dtypes: tuple[torch.dtype, torch.dtype | None], lead: int
) -> None:
    grad, compute = dtypes
    numels = NUMELS if int8 else [5, *NUMELS]
    params = with_formats(adamw_params(numels, torch.float32, grad, torch.float32, compute, lead), int8)
    expected, table = cloned(params), AdamWTable()
    for number in (1, 2):
        step = AdamWStep(number, 0.9, 0.95, 1e-8, 0.5, seed=11)
        adamw_reference(expected, RATES, step)
        table.update(params, RATES, step)
    for a, b in zip(params, expected, strict=True):
        assert same_bits([a.exp_avg, a.exp_avg_sq], [b.exp_avg, b.exp_avg_sq])
        torch.testing.assert_close(a.main, b.main, rtol=2**-21, atol=2**-25)
        if a.compute is not None:
            torch.testing.assert_close(a.compute, b.compute, rtol=2**-8, atol=2**-12)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="compares a GPU with a CPU")
@pytest.mark.parametrize("int8", [False, True])
def test_a_gpu_stores_the_bits_of_a_cpu(int8: bool) -> None:
    numels = [*NUMELS, 1 << 20]
    params = with_formats(adamw_params(numels, torch.float32, torch.float32, torch.float32, torch.bfloat16), int8)
    on_cpu = [AdamWTensors(*(t.cpu() for t in p[:5]), *p[5:]) for p in params]
    table = AdamWTable()
    for number in range(1, 6):
        step = AdamWStep(number, 0.9, 0.95, 1e-8, seed=11)
        table.update(params, RATES, step)
        adamw_reference(on_cpu, RATES.cpu(), step)
    for p, q in zip(params, on_cpu, strict=True):
        assert same_bits([p.exp_avg.cpu(), p.exp_avg_sq.cpu()], [q.exp_avg, q.exp_avg_sq])
        torch.testing.assert_close(p.main.cpu(), q.main, rtol=2**-20, atol=2**-24)


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_the_kernel_stores_what_is_not_finite_as_its_reference_does() -> None:
    for int8 in (False, True):
        params = adamw_params([4 * BLOCK_NUMEL], torch.float32, torch.float32, torch.float32, None)
        params[0].grad[:3] = torch.tensor([math.inf, -math.inf, math.nan])
        params = with_formats(params, int8)
        expected, step = cloned(params), AdamWStep(1, 0.9, 0.95, 1e-8, seed=11)
        adamw_reference(expected, RATES, step)
        AdamWTable().update(params, RATES, step)
        for found, wanted in zip(params[0].tensors[2:4], expected[0].tensors[2:4], strict=True):
            assert same_bits([found], [wanted]) if int8 else torch.equal(found.isnan(), wanted.isnan())


def compiled(state: str) -> str:
    """The kernel's PTX for moments in a Triton type, parameters and gradients in float32."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tl, kernel = triton.language, adamw._adamw_kernel
    types = {"blocks": "*i32", "numels": "*i64", "rows": "*i64", "rates": "*fp32", "clip_factor": "*fp32"}
    types |= {"first_key": "i32", "second_key": "i32"}
    constants = {"MAIN": tl.float32, "GRAD": tl.float32, "STATE": getattr(tl, state), "COMPUTE": tl.bfloat16}
    constants |= {"CLIP": True, "STOCHASTIC": state != "float32", "SPLIT": False, "VECTOR": 4}
    constants |= {"BLOCK": adamw.BLOCK, "TAIL": adamw.TAIL}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "fp32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": adamw.NUM_WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_the_kernel_for_fp32_has_nothing_of_other_formats_and_theirs_move_four_elements_at_once() -> None:
    """Prevents: random bits, exponents or narrow moves that every update pays for. Compiles without a GPU."""
    per_thread = adamw.BLOCK // (32 * adamw.NUM_WARPS)
    plain, bf16, int8 = (compiled(state) for state in ("float32", "bfloat16", "uint8"))
    finalizer = str(0x85EBCA6B - 2**32)  # a factor of the random bits' key
    assert "fma" not in plain and finalizer not in plain and "shfl" not in plain and "global.b8" not in plain
    assert plain.count("ld.global.v4.b32") == 4 * per_thread // 4
    for ptx in (bf16, int8):
        assert finalizer in ptx and ptx.count("ld.global.v4.b32") == 2 * per_thread // 4
    assert bf16.count("ld.global.v2.b32") == 2 * per_thread // 4


@pytest.mark.parametrize("numel", [BLOCK_NUMEL, 64])
def test_blocks_of_another_size_are_refused(numel: int) -> None:
    params = adamw_params([numel], torch.float32, torch.float32, torch.float32, None)
    wrong = torch.zeros(numel, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match=f"expected contiguous tensors of {blocks_nbytes(numel)} elements"):
        AdamWTable().update([params[0]._replace(exp_avg=wrong, exp_avg_sq=wrong)], RATES, AdamWStep(1, 0.9, 0.95, 1e-8))
