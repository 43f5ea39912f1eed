"""What the machine can do, measured or given, and the least time in which work can be done on it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.dtypes import DTYPES
from bench.serve_options import ServeBenchOptions
from launch import probes
from yafsdp_like.hardware import Hardware
from yafsdp_like.inference.plan.quantized_fields import BESIDE_CODES
from yafsdp_like.inference.plan.serving_plan import ServingPlan
from yafsdp_like.models.decoder import DecoderConfig

COPIES = 20
BESIDE = tuple(f"_{end}" for end in BESIDE_CODES)  # ends of names of fields that belong to a quantized matrix


@dataclass(frozen=True)
class Rate:
    """Something a second, and where the figure comes from."""

    value: float
    how: str


@dataclass(frozen=True)
class MeasuredRates:
    """A device's own."""

    hbm: Rate  # bytes read from its memory
    matmul: Rate  # floating-point operations of a large product, sustained
    host: Rate | None = None  # bytes from pinned host memory, where weights are streamed


def rates_of(options: ServeBenchOptions, device: torch.device) -> MeasuredRates:
    """As given by the options, else measured here."""
    given = "given"
    hbm = Rate(options.hbm_rate, given) if options.hbm_rate else copy_rate(device)
    dtype, seconds = DTYPES[options.dtype], options.matmul_seconds
    matmul = Rate(options.matmul_rate, given) if options.matmul_rate else matmul_rate(device, dtype, seconds)
    return MeasuredRates(hbm, matmul, host_rate(device) if options.mode == "streamed" else None)


def host_rate(device: torch.device) -> Rate:
    """Measure the rate of copies from pinned host memory, in bytes/s."""
    how = f"measured: a copy of {probes.COPY_NBYTES[device.type]:,} bytes from the host"
    return Rate(probes.to_device_rate(device, pinned=True, number=COPIES), how)


def copy_rate(device: torch.device) -> Rate:
    """Measure the rate of copies inside the device, in bytes/s read and written."""
    how = f"measured: a copy of {probes.COPY_NBYTES[device.type]:,} bytes, read and written"
    return Rate(probes.copy_rate(device, COPIES), how)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> Rate:
    """Measure the sustained rate of a large product over `seconds`, in operations/s."""
    rows, inner, columns = sizes = probes.LARGE_PRODUCT[device.type]
    how = f"measured: {rows} x {inner} x {columns} in {str(dtype).removeprefix('torch.')}, second half of {seconds:g} s"
    return Rate(probes.product_rate(device, sizes, dtype, seconds), how)


def known_peer_rate(options: ServeBenchOptions, device: torch.device) -> Rate | None:
    """Bytes a second from another device: given, or known of such devices."""
    if options.peer_rate:
        return Rate(options.peer_rate, "given")
    hardware = Hardware.of(device)
    if hardware is None or hardware.rates is None:
        return None
    return Rate(hardware.rates.peer_nbytes, f"known of {hardware.name}")


# --- work ---


def forward_flops(config: DecoderConfig, start: int, num_tokens: int, num_drawn: int) -> int:
    """Operations of a forward over positions [start, start + num_tokens), of which ``num_drawn`` go through the head.

    They are 2 per weight and token, and 4 per head, element of it, and pair of a query and a key that it sees.
    """
    active = sum(config.of_layer(index).block_num_active_weights for index in range(config.num_layers))
    products = active * num_tokens + config.vocab_size * config.dim * num_drawn
    return 2 * products + attention_flops(config, start, num_tokens)


def attention_flops(config: DecoderConfig, start: int, num_tokens: int) -> int:
    """Of those, the attention's."""
    pairs = sum(_num_pairs(start, num_tokens, config.window_of(layer)) for layer in range(config.num_layers))
    return 4 * config.num_heads * config.head_dim * pairs


def _num_pairs(start: int, num_tokens: int, window: int | None) -> int:
    """The query at position p sees p + 1 keys, or a window of them."""
    end = start + num_tokens
    whole = min(end, end if window is None else max(start, window))  # up to here all that came before is seen
    before = (start + 1 + whole) * (whole - start) // 2
    return before + (end - whole) * (window or 0)


def kv_nbytes(plan: ServingPlan, context: float) -> float:
    """Keys and values that one query of a sequence sees, in all layers."""
    total = 0.0
    for group in plan.groups:
        shape = group.shape
        per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * shape.itemsize
        total += per_token * (context if group.window is None else min(context, group.window))
    return total


def decode_floor_s(plan: ServingPlan, batch: int, context: float, rates: MeasuredRates) -> float:
    """Return the least time of a step that decodes, in seconds.

    Each product takes at least the larger of reading its weights and of computing, and so does attention, of reading
    all contexts; each needs the one before it. Of the embedding some rows are looked up. Of experts those are read that
    some token visits, as many as even random choices come to.
    """
    experts = plan.config.experts
    visited = 1.0 if experts is None else experts.experts_per_token / experts.num_experts  # by one token

    def seconds(product: Product) -> float:
        share = visited if product.is_experts else 1.0
        reading = product.nbytes * (1 - (1 - share) ** batch) / rates.hbm.value
        return max(reading, 2 * batch * product.numel * share / rates.matmul.value)

    products = sum(map(seconds, products_of(plan)))
    reading = batch * kv_nbytes(plan, context) / rates.hbm.value
    computing = batch * attention_flops(plan.config, int(context), 1) / num_sharers(plan) / rates.matmul.value
    return products + max(reading, computing)


@dataclass(frozen=True)
class Product:
    """What one rank reads to multiply by a matrix, or by those of all experts."""

    nbytes: int  # as stored: of a quantized matrix its codes, and what lies beside them
    numel: int  # weights
    is_experts: bool = False


def products_of(plan: ServingPlan) -> Iterator[Product]:
    """Yield all products of a forward.

    The head is whole on tensor parallel ranks, and each multiplies by its part of the vocabulary.
    """
    *layers, head = [plan.placement.packed_units[unit] for unit in plan.placement.uses[1:]]
    for unit in layers:
        for matrix in (field for field in unit.fields if len(field.shape) > 1 and not field.name.endswith(BESIDE)):
            names = {matrix.name, *(matrix.name + end for end in BESIDE)}
            nbytes = sum(
                parameter.nbytes for field in unit.fields if field.name in names for parameter in field.parameters
            )
            num_codes = 2 if matrix.dtype == torch.uint8 else 1  # of 4 bits in a byte
            yield Product(nbytes, matrix.numel * num_codes, len(matrix.shape) > 2)
    matrix, num_parts = head.fields[0], num_sharers(plan)
    yield Product(matrix.numel * matrix.dtype.itemsize // num_parts, matrix.numel // num_parts)


def num_sharers(plan: ServingPlan) -> int:
    """Ranks that compute one forward."""
    return plan.placement.num_ranks if plan.mode == "tensor_parallel" else 1


def prefill_floor_s(plan: ServingPlan, num_tokens: int, rates: MeasuredRates) -> float:
    """Of one prompt."""
    return forward_flops(plan.config, 0, num_tokens, 1) / num_sharers(plan) / rates.matmul.value


def offline_floor_s(
    plan: ServingPlan, num_requests: int, batch: int, num_prompt: int, num_new: int, rates: MeasuredRates
) -> float:
    """All prompts, then all other tokens, in full batches whose contexts grow."""
    prompts = num_requests * prefill_floor_s(plan, num_prompt, rates)
    steps = sum(decode_floor_s(plan, batch, num_prompt + drawn, rates) for drawn in range(1, num_new))
    return prompts + steps * num_requests / batch


def gather_floor_s(plan: ServingPlan, peer_rate: float) -> float:
    """Of one forward: others' parts of all units that are gathered in each."""
    return _num_moved(plan) * (plan.placement.num_ranks - 1) / plan.placement.num_ranks / peer_rate


def streaming_floor_s(plan: ServingPlan, rates: MeasuredRates) -> float:
    """Of one forward; 0 where nothing is streamed."""
    return 0.0 if rates.host is None else _num_moved(plan) / rates.host.value


def _num_moved(plan: ServingPlan) -> int:
    """Bytes of the units that every forward moves, since another takes their bytes."""
    placement, (slots, _) = plan.placement, plan.placement.slots
    lent = [unit for unit in slots if any(slots[unit].overlaps(slots[other]) for other in slots if other != unit)]
    return sum(placement.packed_units[unit].nbytes for unit in lent)
