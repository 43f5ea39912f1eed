"""The serving plan: bytes as equations, what is moved when not all fits, and what it says where nothing does."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from yafsdp_like import hardware
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.buffers import ALWAYS, WORKSPACE
from yafsdp_like.inference.plan.packed_weights import pack_units, uses_of
from yafsdp_like.inference.plan.placement import MIN_GRANULES_PER_PART, Mode, Placement, placements
from yafsdp_like.inference.plan.serving_plan import ServingPlan, Site, least_nbytes, plan_serving
from yafsdp_like.inference.plan.step_floors import decode_seconds, read_nbytes, read_numel
from yafsdp_like.memory.layout import aligned
from yafsdp_like.memory.plan import KINDS
from yafsdp_like.models import PRESETS, DecoderConfig
from yafsdp_like.models.quantization import Quantization

GIB = 1 << 30
H200 = Site(hardware=hardware.H200)
CHAIN = DecoderConfig(64, 12, 4, 2, 176, vocab_size=4096)
TIED = replace(CHAIN, tie_embeddings=True)
SMALL = EngineOptions(kv_nbytes=1 << 20, max_batch_size=4, max_batch_tokens=32, max_seq_len=64)


def limited(nbytes: int, **more: int) -> EngineOptions:
    return replace(SMALL, kv_nbytes=None, memory_limit_nbytes=nbytes, **more)


def all_moved(config: DecoderConfig, mode: Mode = "streamed", num_ranks: int = 1) -> Placement:
    """Every unit, embedding and head too."""
    return list(placements(config, torch.bfloat16, mode, num_ranks))[-1]


# --- packed_units ---


@pytest.mark.parametrize("name", PRESETS)
def test_images_hold_every_parameter_once_and_little_else(name: str) -> None:
    config = PRESETS[name]
    packed_units = pack_units(config, torch.bfloat16)
    found = [parameter for packed in packed_units for parameter, _ in packed.parameters()]
    assert len({parameter.name for parameter in found}) == len(found)
    assert sum(parameter.numel for parameter in found) == config.num_params
    padding = sum(packed.nbytes for packed in packed_units) - 2 * config.num_params
    assert 0 <= padding < 256 * sum(len(packed.fields) for packed in packed_units)


def test_projections_lie_back_to_back_in_the_order_of_their_matrix() -> None:
    """So that the rows of q, k and v are one matrix without a copy, whatever their sizes."""
    config = DecoderConfig(40, 1, 5, 1, 24, vocab_size=31, qkv_bias=True)
    (_, layer, _) = pack_units(config, torch.float32)
    where = {parameter.name.removeprefix("layers.0."): segment for parameter, segment in layer.parameters()}
    for parts in (
        [f"self_attn.{x}_proj.weight" for x in "qkv"],
        [f"self_attn.{x}_proj.bias" for x in "qkv"],
        [f"mlp.{x}_proj.weight" for x in ("gate", "up")],
    ):
        assert where[parts[0]].offset_nbytes % 256 == 0
        assert [where[part].end_nbytes for part in parts[:-1]] == [where[part].offset_nbytes for part in parts[1:]]


def test_the_buffers_of_experts_are_planned_and_layers_without_have_their_own() -> None:
    """T = 32 tokens with 8 visits each: R = 256; in bf16, int32 and float32."""
    config = PRESETS["30b-a3b"]
    options = replace(SMALL, kv_nbytes=GIB)
    some = replace(config, dense_layers=(0,), dense_ffn_dim=6144)
    nbytes = {name: buffer.nbytes for name, buffer in plan_serving(some, options).buffers.buffers.items()}
    assert nbytes["router"] == 2 * 32 * 128
    assert nbytes["visit_experts"] == nbytes["visit_weights"] == nbytes["visit_order"] == 4 * 256
    assert nbytes["visit_starts"] == 4 * 129
    assert nbytes["expert_hidden"] == 2 * 256 * 768
    assert nbytes["expert_parts"] == 2 * 256 * 2048
    assert nbytes["gate_up"] == 2 * 32 * 2 * 6144
    assert plan_serving(config, options).buffers.buffers["gate_up"].nbytes == 0
    assert plan_serving(PRESETS["0.6b"], options).buffers.buffers["expert_parts"].nbytes == 0


def test_decoding_reads_the_experts_that_are_visited() -> None:
    """One token 8 of 128; 32 tokens 1 - (15 / 16)^32 = 0.873 of them, were all experts as likely."""
    config = PRESETS["30b-a3b"]
    plan = plan_serving(config, EngineOptions(memory_limit_nbytes=130 * GIB, max_seq_len=4096), H200)
    rates = hardware.H200.rates
    assert rates is not None
    experts = 2 * 48 * 128 * 3 * 2048 * 768
    others = read_nbytes(plan.placement) - experts
    assert plan.decode_seconds(rates) == pytest.approx((others + experts / 16) / rates.memory_nbytes, rel=1e-6)
    pages = 32 * plan.capacity.nbytes_of(4096)
    many = others + (1 - (15 / 16) ** 32) * experts + pages
    assert plan.decode_seconds(rates, 32) == pytest.approx(many / rates.memory_nbytes, rel=1e-6)


@pytest.mark.parametrize(
    "quantization", [Quantization("awq", 4, group_columns=128, has_zeros=True), Quantization("fp8", 8)], ids=["4", "8"]
)
def test_a_row_is_multiplied_with_as_many_weights_in_however_few_bits_they_are_stored(quantization: Any) -> None:
    config, rates = PRESETS["8b"], hardware.H200.rates
    assert rates is not None
    options = EngineOptions(memory_limit_nbytes=130 * GIB, max_seq_len=4096)
    full, stored = (plan_serving(it, options, H200) for it in (config, replace(config, quantization=quantization)))
    assert read_numel(stored.placement) == read_numel(full.placement) == read_nbytes(full.placement) // 2
    assert read_nbytes(stored.placement) < 0.65 * read_nbytes(full.placement)
    times = [decode_seconds(plan.placement, rates, 4096) for plan in (full, stored)]
    assert times == [2 * 4096 * read_numel(full.placement) / rates.flops] * 2


# --- slots ---


def test_a_chain_of_layers_takes_two_slots_whose_live_ranges_follow_each_other() -> None:
    placement = list(placements(CHAIN, torch.bfloat16, "streamed"))[CHAIN.num_layers - 1]
    layer = placement.packed_units[1].nbytes
    assert placement.non_resident == frozenset(range(1, 13))
    assert placement.slots[1] == 2 * layer
    live = placement.live_ranges()
    assert [live[unit].intervals for unit in (2, 3)] == [((1, 2),), ((2, 3),)]
    assert live[1].intervals == ((0, 1), (12, 13)), "brought while the last layer and the head are computed"


def test_a_tied_head_and_the_next_embedding_are_one_use() -> None:
    """Prevents: bringing the same matrix twice a forward, and leaving the first layer no time to arrive."""
    placement = all_moved(TIED)
    assert placement.uses == (*range(13), 0)
    assert placement.runs[0] == (0, (13, 0))
    assert placement.live_ranges()[0].intervals == ((0, 0), (12, 13))
    assert placement.live_ranges()[1].intervals == ((0, 1), (13, 13))
    assert placement.following(12) == (*range(12),) and placement.following(0) == (*range(1, 13),)


@pytest.mark.parametrize("config", [CHAIN, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_slots_that_are_live_together_never_share_a_byte(config: DecoderConfig, num_ranks: int) -> None:
    for placement in placements(config, torch.float32, "gathered" if num_ranks > 1 else "streamed", num_ranks):
        segments, nbytes = placement.slots
        live = placement.live_ranges()
        for unit, segment in segments.items():
            assert segment.nbytes == placement.slot_nbytes(unit) >= placement.packed_units[unit].nbytes
            assert segment.end_nbytes <= nbytes
            for other in segments.keys() - {unit}:
                assert not (live[unit].overlaps(live[other]) and segment.overlaps(segments[other]))
        assert placement.nbytes_at_least <= placement.nbytes


def test_moved_layers_are_evenly_spread_so_that_each_has_time_to_arrive() -> None:
    by_count = [sorted(placement.non_resident) for placement in placements(CHAIN, torch.bfloat16, "streamed")]
    assert by_count[:4] == [[7], [4, 10], [3, 7, 11], [2, 5, 8, 11]]
    assert by_count[11:] == [[*range(1, 13)], [*range(1, 14)], [*range(14)]]


# --- the plan is an equation ---


def test_the_plan_of_resident_weights_is_an_equation() -> None:
    plan = plan_serving(CHAIN, SMALL)
    t, b, v, d = 32, 4, 4096, 64
    qkv, attended, gate_up = 2 * t * 8 * 16, 2 * t * 4 * 16, 2 * t * 2 * 176
    attention, last, turns = 4 * b * 4 * 17, 2 * b * d, 2 * t * 16
    shared = max(qkv + aligned(attended) + aligned(attention), gate_up, last)
    assert plan.memory.nbytes_of("weights") == sum(packed.nbytes for packed in pack_units(CHAIN, torch.bfloat16))
    page = 12 * 2 * 2 * 16 * 16 * 2  # layers, keys and values, kv heads, tokens, head dim, bytes
    assert plan.memory.nbytes_of("kv slabs") == (1 << 20) // (2 * page) * (2 * page), "whole slabs, of two pages"
    assert plan.memory.nbytes_of("workspace") == aligned(shared) + 2 * (2 * t * d) + 2 * turns
    rows = 2 * b * v + 4 * b * v + 2 * aligned(4 * b) + aligned(4 * b * 20) + aligned(8 * b * 20)
    assert plan.memory.nbytes_of("logits") == rows
    tables = aligned(8 * (b + t)) + 3 * aligned(8 * t) + aligned(4 * t) + aligned(4 * (b + 4) * 4)
    tables += aligned(4 * (b + 4)) + aligned(4 * (b + 1)) + aligned(8 * b) + aligned(4 * b * 7) + aligned(8 * b * 4)
    tables += 4 * b * v + 2 * (2 * 64 * 16)
    limits = aligned(b * v // 8) + aligned(4 * b * 7) + aligned(8 * b * 4) + aligned(b) + aligned(8 * b)
    tables += limits + (4 + 8) * b * 512 + aligned(8 * t)  # biases, tokens that follow those of scored prompts
    assert plan.memory.nbytes_of("tables") == tables
    kinds = ("weights", "kv slabs", "workspace", "logits", "tables")
    assert plan.memory.nbytes == sum(plan.memory.nbytes_of(kind) for kind in kinds)
    assert plan.host.nbytes == 0


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_plan_of_gathered_weights_is_an_equation(num_ranks: int) -> None:
    plan = plan_serving(TIED, SMALL, Site(num_ranks=num_ranks), "gathered")
    packed_units = plan.placement.packed_units
    parts = [aligned(-(-packed.nbytes // num_ranks)) for packed in packed_units]
    assert plan.placement.non_resident == frozenset(range(1, 13))
    assert plan.memory.nbytes_of("weights") == packed_units[0].nbytes
    assert plan.memory.nbytes_of("weight shards") == sum(parts[1:])
    assert plan.memory.nbytes_of("weight slots") == 2 * num_ranks * parts[1]


@pytest.mark.parametrize(
    ("name", "num_ranks", "granule_nbytes"),
    [("8b", 2, 2 << 20), ("8b", 8, 2 << 20), ("70b", 2, 8 << 20), ("70b", 8, 2 << 20)],
)
def test_slots_hold_other_ranks_parts_alone_where_memory_is_mapped(
    name: str, num_ranks: int, granule_nbytes: int
) -> None:
    site = Site(num_ranks=num_ranks, maps_memory=True)
    plan = plan_serving(PRESETS[name], replace(SMALL, kv_nbytes=1 << 30), site, "gathered")
    layer = plan.placement.packed_units[1].nbytes
    part = aligned(-(-layer // num_ranks), granule_nbytes)
    assert plan.memory.nbytes_of("weight slots") == 2 * (num_ranks - 1) * part
    assert plan.memory.nbytes_of("weight shards") == PRESETS[name].num_layers * part
    assert part <= (1 + 1 / MIN_GRANULES_PER_PART) * layer / num_ranks
    in_granules = [region for region in plan.memory.regions if region.granule_nbytes]
    assert {region.kind for region in in_granules} == {"weight slots", "weight shards"}
    assert {region.granule_nbytes for region in in_granules} == {granule_nbytes}


def test_parts_of_few_pages_are_copied_into_slots() -> None:
    plan = plan_serving(TIED, SMALL, Site(num_ranks=2, maps_memory=True), "gathered")
    assert plan.placement.granule_nbytes == 0
    assert plan.memory.nbytes_of("weight slots") == 2 * 2 * plan.placement.part_nbytes(1)


def test_the_plan_of_streamed_weights_is_an_equation() -> None:
    plan = plan_serving(TIED, replace(SMALL, host_kv_nbytes=1 << 20), mode="streamed")
    packed_units = plan.placement.packed_units
    assert plan.memory.nbytes_of("weights") == packed_units[0].nbytes
    assert plan.memory.nbytes_of("weight slots") == 2 * packed_units[1].nbytes
    assert plan.host.nbytes_of("host weights") == 12 * packed_units[1].nbytes
    assert plan.host.nbytes_of("host kv slabs") == plan.memory.nbytes_of("kv slabs")
    assert plan.memory.nbytes_of("weight shards") == 0


def test_buffers_of_one_region_share_bytes_only_when_they_are_not_live_together() -> None:
    buffers = plan_serving(PRESETS["8b"], limited(140 * GIB), H200).buffers
    for name, buffer in buffers.buffers.items():
        for other in buffers.buffers.values():
            if other.name != name and other.kind == buffer.kind and other.live.overlaps(buffer.live):
                assert not buffers.segments[name].overlaps(buffers.segments[other.name]) or not other.nbytes
    shared = [buffer for buffer in buffers.buffers.values() if buffer.live != ALWAYS]
    assert {buffer.kind for buffer in shared} == {WORKSPACE}


def test_activations_that_may_share_bytes_are_these() -> None:
    """Prevents: a buffer that is read after another took its bytes."""
    buffers = [b for b in plan_serving(CHAIN, SMALL).buffers.buffers.values() if b.kind == WORKSPACE]
    apart = {(a.name, b.name) for a in buffers for b in buffers if a.name < b.name and not a.live.overlaps(b.live)}
    attending, visits = ("attended", "attention", "qkv"), ("experts", "weights", "order", "starts")
    feeding = ("gate_up", "router", *(f"visit_{table}" for table in visits), "expert_hidden", "expert_parts")
    before_drawing = (*attending, *feeding, "step_cos", "step_sin", "adapted", "products")
    pairs = [*((a, b) for a in attending for b in feeding), *((a, "last") for a in before_drawing)]
    assert apart == {(min(pair), max(pair)) for pair in pairs}


# --- what is chosen ---


def total(plan: ServingPlan) -> int:
    return sum(packed.nbytes for packed in plan.placement.packed_units)


@pytest.mark.parametrize("name", PRESETS)
def test_any_preset_is_planned_without_a_gpu(name: str) -> None:
    plan = plan_serving(PRESETS[name], EngineOptions(memory_limit_nbytes=160 * GIB), H200)
    assert plan.mode == "resident"
    assert plan.memory.nbytes <= 160 * GIB
    assert plan.num_context_tokens >= plan.max_seq_len > 0
    for kind in KINDS:
        assert (f"  {kind} " in str(plan)) == bool(plan.memory.nbytes_of(kind)), kind


def test_a_limit_is_used_but_for_less_than_a_slab() -> None:
    plan = plan_serving(PRESETS["8b"], limited(40 * GIB, max_seq_len=8192), H200)
    assert 0 <= 40 * GIB - plan.memory.nbytes - plan.recordings_nbytes < plan.grid.slab_nbytes


@pytest.mark.parametrize(("num_ranks", "mode"), [(1, "streamed"), (2, "gathered")])
def test_as_few_units_move_as_leave_room_for_the_batch(num_ranks: int, mode: str) -> None:
    site = replace(H200, num_ranks=num_ranks)
    config = PRESETS["8b"]
    plan = plan_serving(config, limited(14 * GIB, max_batch_size=8, max_seq_len=2048), site)
    assert plan.mode == mode
    assert plan.num_context_tokens >= 8 * 2048
    assert 0 < len(plan.placement.non_resident) < config.num_layers, "some layers stay"
    fewer = list(placements(config, torch.bfloat16, plan.mode, num_ranks))[len(plan.placement.non_resident) - 2]
    assert len(fewer.non_resident) == len(plan.placement.non_resident) - 1
    room = 14 * GIB - fewer.nbytes - plan.buffers.nbytes
    assert room <= 0 or not plan.capacity.holds(room, 8 * 2048, 2048), "one layer more would have left the room, too"


def test_where_the_whole_batch_finds_no_room_all_layers_move_for_one_sequence() -> None:
    plan = plan_serving(PRESETS["8b"], limited(5 * GIB, max_batch_size=32, max_seq_len=8192), H200)
    assert plan.mode == "streamed"
    assert {*range(1, 33)} <= plan.placement.non_resident
    assert 8192 <= plan.num_context_tokens < 32 * 8192


def test_a_small_device_moves_embedding_and_head_too() -> None:
    """They are larger than a layer; while layers run, others use their slots' bytes."""
    plan = plan_serving(PRESETS["8b"], limited(int(3.2 * GIB), max_batch_size=8, max_seq_len=1024), H200)
    packed_units = plan.placement.packed_units
    assert plan.placement.non_resident == frozenset(range(34))
    assert plan.memory.nbytes_of("weight slots") == packed_units[0].nbytes + packed_units[-1].nbytes


def test_asked_for_a_mode_moves_all_layers_where_there_is_no_limit() -> None:
    assert plan_serving(CHAIN, SMALL).mode == "resident"
    assert plan_serving(CHAIN, SMALL, Site(num_ranks=4)).mode == "resident"
    assert plan_serving(CHAIN, SMALL, mode="streamed").placement.non_resident == {*range(1, 13)}
    assert plan_serving(CHAIN, SMALL, Site(num_ranks=2), "gathered").placement.non_resident == {*range(1, 13)}


def test_windowed_layers_let_more_context_fit() -> None:
    windowed = replace(CHAIN, sliding_window=16, windowed_layers=tuple(range(1, 12)))
    limits = replace(SMALL, kv_nbytes=16 << 20, max_seq_len=4096)
    dense, sparse = plan_serving(CHAIN, limits), plan_serving(windowed, limits)
    assert [len(group.layers) for group in sparse.groups] == [1, 11]
    assert sparse.num_context_tokens > 2 * dense.num_context_tokens


def test_where_all_layers_are_windowed_a_sequence_may_be_as_long_as_the_models() -> None:
    windowed = replace(CHAIN, sliding_window=16)
    plan = plan_serving(windowed, replace(SMALL, kv_nbytes=1 << 20, max_seq_len=None))
    assert plan.max_seq_len == CHAIN.max_seq_len > 100 * plan_serving(CHAIN, SMALL).num_context_tokens


def test_pages_in_float8_hold_twice_the_tokens() -> None:
    both = [plan_serving(CHAIN, replace(SMALL, kv_dtype=dtype)) for dtype in ("bfloat16", "float8_e4m3fn")]
    assert both[1].num_context_tokens == 2 * both[0].num_context_tokens


def test_a_sequence_that_is_not_limited_may_be_as_long_as_fits() -> None:
    short = plan_serving(CHAIN, replace(SMALL, max_seq_len=None, kv_nbytes=1 << 20))
    assert short.max_seq_len == short.num_context_tokens < CHAIN.max_seq_len
    long = plan_serving(replace(CHAIN, max_seq_len=128), replace(SMALL, max_seq_len=None))
    assert long.max_seq_len == 128


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_tables_have_the_positions_that_fit_beside_the_weights_and_no_more(mode: Mode) -> None:
    """Prevents: tables of all positions that the whole limit would have pages for, weights' bytes among it."""
    limits = EngineOptions(memory_limit_nbytes=round(16.5 * GIB), max_batch_size=4)
    plan = plan_serving(PRESETS["8b"], limits, H200, mode)
    tables = {name: plan.buffers.buffers[name].shape[0] for name in ("cos", "sin")}
    assert tables == dict.fromkeys(tables, plan.max_seq_len)
    assert plan.memory.nbytes + plan.recordings_nbytes <= limits.memory_limit_nbytes
    asked = plan_serving(PRESETS["8b"], replace(limits, max_seq_len=plan.max_seq_len), H200, mode)
    assert plan.memory.nbytes_of("tables") == asked.memory.nbytes_of("tables")


def test_what_a_refusal_says_is_enough_is_so_where_sequences_may_be_as_long_as_fits() -> None:
    """Prevents: a limit that buys longer tables, for which it is then too small."""
    limits = EngineOptions(memory_limit_nbytes=10 * GIB, max_batch_size=4)
    with pytest.raises(ValueError, match="It fits with memory_limit_nbytes=") as refused:
        plan_serving(PRESETS["8b"], limits, H200, "resident")
    enough = int(str(refused.value).rpartition("It fits with memory_limit_nbytes=")[2])
    plan = plan_serving(PRESETS["8b"], replace(limits, memory_limit_nbytes=enough), H200, "resident")
    assert plan.max_seq_len == limits.max_batch_tokens
    assert enough == least_nbytes(PRESETS["8b"], limits, H200, "resident")


def test_a_sequence_may_be_as_long_as_fits_beside_tables_of_its_positions() -> None:
    limits = EngineOptions(memory_limit_nbytes=round(16.5 * GIB), max_batch_size=4)
    plan = plan_serving(PRESETS["8b"], limits, H200)
    plan_serving(PRESETS["8b"], replace(limits, max_seq_len=plan.max_seq_len), H200, "resident")
    with pytest.raises(ValueError, match="does not fit"):
        plan_serving(PRESETS["8b"], replace(limits, max_seq_len=plan.max_seq_len + 1), H200, "resident")


# --- in words ---


def test_the_plan_says_its_mode_and_why_and_what_a_step_takes_at_least() -> None:
    resident = plan_serving(PRESETS["8b"], limited(140 * GIB), H200)
    assert resident.reasons[0] == "resident: all 16,060,522,496 bytes of weights stay on the device"
    assert "3.5 ms at least: 283 tokens/s" in resident.reasons[2]
    site = replace(H200, num_ranks=2, maps_memory=True)
    gathered = plan_serving(PRESETS["8b"], limited(14 * GIB, max_batch_size=32, max_seq_len=1024), site)
    assert re.search(r"gathered: \d+ of 34 units come out of the shards of 2 ranks", gathered.reasons[0])
    assert "a layer's hides in steps of 641 tokens" in gathered.reasons[-1]
    streamed = plan_serving(PRESETS["8b"], limited(12 * GIB), H200)
    assert "a layer's hides in steps of 9,488 tokens" in streamed.reasons[-1]
    assert "in host memory: " in str(streamed) and "host weights" in str(streamed)


def test_the_plan_says_why_weights_do_not_all_stay() -> None:
    by_limit = plan_serving(PRESETS["8b"], limited(16 * GIB, max_seq_len=16_384), H200)
    assert by_limit.reasons[0].endswith("for keys and values, too few for 16,384 tokens")
    by_pages = plan_serving(PRESETS["8b"], replace(limited(16 * GIB), kv_nbytes=2 * GIB), H200)
    assert by_pages.reasons[0].endswith("for keys and values, fewer than kv_nbytes")
    asked = plan_serving(PRESETS["8b"], limited(14 * GIB), H200, "streamed")
    assert asked.reasons[0].endswith("out of host memory in every forward, as asked for")


def test_the_plan_says_where_ranks_must_keep_step() -> None:
    for maps_memory in (True, False):
        plan = plan_serving(CHAIN, SMALL, Site(num_ranks=2, maps_memory=maps_memory), "gathered")
        assert ("same number of forwards" in str(plan)) is not maps_memory
        shards = [region for region in plan.memory.regions if region.kind == "weight shards"]
        assert {region.mapped for region in shards} == {maps_memory}


# --- what does not fit ---


@pytest.mark.parametrize("mode", ["auto", "resident", "streamed"])
@pytest.mark.parametrize(("name", "limit"), [("8b", GIB), ("70b", 2 * GIB), ("135m", 10 << 20)])
def test_what_does_not_fit_says_what_is_missing_and_that_then_fits(name: str, limit: int, mode: Mode) -> None:
    limits = EngineOptions(memory_limit_nbytes=limit, max_seq_len=4096)
    with pytest.raises(ValueError, match="bytes are missing") as refused:
        plan_serving(PRESETS[name], limits, mode=mode)
    needed = int(re.search(r"It fits with memory_limit_nbytes=(\d+)", str(refused.value))[1])  # type: ignore[index]
    missing = int(re.search(r"([\d,]+) bytes are missing", str(refused.value))[1].replace(",", ""))  # type: ignore[index]
    assert needed - limit == missing > 0
    plan = plan_serving(PRESETS[name], replace(limits, memory_limit_nbytes=needed), mode=mode)
    assert plan.max_seq_len == 4096 and plan.memory.nbytes <= needed
    assert plan.memory.nbytes > 0.95 * needed, "much more was asked for than is used"


def test_where_shorter_sequences_would_fit_the_error_says_how_long_they_may_be() -> None:
    limits = EngineOptions(memory_limit_nbytes=17 * GIB, max_seq_len=131_072)
    with pytest.raises(ValueError, match="or with max_seq_len=") as refused:
        plan_serving(PRESETS["8b"], limits, H200, "resident")
    longest = int(re.search(r"max_seq_len=(\d+)", str(refused.value))[1])  # type: ignore[index]
    assert 1024 < longest < 16_384
    assert plan_serving(PRESETS["8b"], replace(limits, max_seq_len=longest), H200, "resident").max_seq_len == longest


def test_pages_that_find_no_room_are_told_how_much_there_is() -> None:
    limits = EngineOptions(memory_limit_nbytes=17 * GIB, kv_nbytes=4 * GIB, max_seq_len=1024)
    with pytest.raises(ValueError, match="or with kv_nbytes=") as refused:
        plan_serving(PRESETS["8b"], limits, H200, "resident")
    room = int(re.search(r"or with kv_nbytes=(\d+)", str(refused.value))[1])  # type: ignore[index]
    assert plan_serving(PRESETS["8b"], replace(limits, kv_nbytes=room), H200, "resident").mode == "resident"


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({}, "memory_limit_nbytes or kv_nbytes"),
        ({"kv_nbytes": 0}, "kv_nbytes must be at least 1"),
        ({"kv_nbytes": GIB, "max_batch_size": 8, "max_batch_tokens": 4}, "a token of each sequence"),
        ({"kv_nbytes": GIB, "page_size": 0}, "page_size must be at least 1"),
        ({"kv_nbytes": GIB, "max_seq_len": 200_000}, "at most 131072, the model's"),
        ({"kv_nbytes": 4096, "max_seq_len": 8192}, "8192 must fit"),
        ({"kv_nbytes": GIB, "kv_dtype": "int4"}, "dtype must be one of"),
        ({"kv_nbytes": GIB, "host_kv_nbytes": 1000}, "hold no pages"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plan_serving(CHAIN, EngineOptions(**limits))


def test_modes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two ranks"):
        plan_serving(CHAIN, SMALL, mode="gathered")
    with pytest.raises(ValueError, match="mode must be one of"):
        plan_serving(CHAIN, SMALL, mode="paged")  # type: ignore[arg-type]


def test_steps_of_a_forward_read_every_unit_in_order() -> None:
    for config in (CHAIN, TIED):
        packed_units = pack_units(config, torch.bfloat16)
        names = [packed_units[unit].name for unit in uses_of(packed_units, config)]
        last = "embed_tokens" if config.tie_embeddings else "lm_head"
        assert names == ["embed_tokens", *(f"layers.{i}" for i in range(12)), last]
