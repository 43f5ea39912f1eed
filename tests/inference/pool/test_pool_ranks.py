"""A pool over two ranks, each with its part of every model: the tokens of models alone, and the same done on both."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from tests.inference.engine.test_engine import GREEDY, TINY, allocations, decoder, prompts, requests
from tests.inference.pool.test_model_pool import CONFIGS, LARGE, ONE, alone, check_idle, pooled, races, tokens
from tests.ranks import RankError, run_ranks
from yafsdp_like.comm.tp_group import TPGroup
from yafsdp_like.hardware import Hardware
from yafsdp_like.inference.engine.request import FinishReason, Request
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.options import PoolOptions
from yafsdp_like.inference.plan.quantized_fields import stored_units
from yafsdp_like.inference.pool import pool as pool_module
from yafsdp_like.inference.pool.driver import PoolDriver
from yafsdp_like.inference.pool.loads import LOOK_S
from yafsdp_like.inference.pool.member import ModelState
from yafsdp_like.inference.pool.memory import maps_slabs
from yafsdp_like.inference.pool.plan import PoolPlan, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.pool.tp_pool import TPPool, follow_pool
from yafsdp_like.inference.pool.weights import PooledWeights
from yafsdp_like.inference.weights.loading import Model, ModuleSource, fill, model_of, world_transport
from yafsdp_like.inference.weights.store import Store
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES
from yafsdp_like.memory.streams import COMPUTE, GATHER, HOST_TO_DEVICE, Event, InOrder
from yafsdp_like.models.moe import ExpertsConfig
from yafsdp_like.models.tensor_parallel import cuts_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from yafsdp_like.comm import TransportName
    from yafsdp_like.inference.weights.loading import Source

SMALL = 140 << 10  # bytes of slabs on each rank, for the parts of one model
SECONDS = 30.0  # that nothing here should take, on the slowest machine


def plan_of(slabs_nbytes: int = SMALL, num_ranks: int = 2, maps_memory: bool = False, **more: Any) -> PoolPlan:
    ranks = {"num_ranks": num_ranks, "maps_memory": maps_memory}
    wide = plan_pool(pooled(), PoolOptions(1 << 30), **ranks)
    limit = wide.memory.nbytes - wide.grid.region_nbytes + slabs_nbytes
    return plan_pool(pooled(), PoolOptions(limit, **{"host_kv_nbytes": 256 << 10, **more}), **ranks)


def models_of(wrap: Callable[[Model], Model] = lambda model: model) -> dict[str, Model]:
    return {name: wrap(model_of(decoder(config))) for name, config in CONFIGS.items()}


def rank_pool(
    slabs_nbytes: int = SMALL,
    models: dict[str, Model] | None = None,
    asked: TransportName = "process_group",
    **more: Any,
) -> ModelPool:
    """This rank's of a pool over all of them."""
    transport = world_transport("cpu", asked)
    plan = plan_of(slabs_nbytes, maps_memory=maps_slabs(transport), **more)
    pool = ModelPool(plan, models_of() if models is None else models, transport=transport)
    assert (pool.arena.nbytes, pool.host.nbytes) == (plan.memory.nbytes, plan.host.nbytes)
    return pool


def facts(pool: ModelPool) -> tuple[Any, ...]:
    """What must be the same on all ranks once nothing is under way."""
    check_idle(pool)
    slabs = [sorted(member.residence.owned) for member in pool._members.values()]
    steps = [
        (member.engine.metrics().num_steps, member.engine.metrics().num_preempted) for member in pool._members.values()
    ]
    return [*pool.switches], slabs, steps, pool.states(), pool.num_steps


# --- plans ---


def test_a_plan_over_two_ranks_is_of_one_of_them_and_says_so() -> None:
    whole, half = plan_of(LARGE, num_ranks=1), plan_of(LARGE)
    for name, plan in half.models.items():
        vocabulary = sum(part.nbytes for part in plan.serving.placement.packed_units[:: len(plan.units) - 1])
        assert plan.image_nbytes < whole.models[name].image_nbytes / 2 + vocabulary
        assert [group.shape.num_kv_heads for group in plan.serving.groups] == [1] * len(plan.serving.groups)
    assert str(half).startswith("2 ranks compute every step together, each with its part of every model:")
    assert "memory plan of one rank of 2" in str(half) and "over process group: sums" in str(half)


def test_ranks_that_map_memory_bring_each_byte_of_a_model_once() -> None:
    """But for norms, biases and the like, which lie in layers and are whole on all."""
    both, plan = plan_of(LARGE), plan_of(LARGE, maps_memory=True)
    for name, model in plan.models.items():
        packed = model.serving.placement.packed_units
        whole = [unit for unit in range(len(packed)) if unit == 0 or packed[unit].name == "lm_head"]
        assert [unit for unit in range(len(packed)) if model.is_pulled(unit)] == whole
        saved = sum(both.models[name].host_units[unit].nbytes - model.host_units[unit].nbytes for unit in whole)
        assert model.image_nbytes == both.models[name].image_nbytes - saved
        assert all(
            2 * model.host_units[unit].nbytes == model.units[unit].nbytes >= packed[unit].nbytes for unit in whole
        )
        assert model.home_nbytes <= both.models[name].home_nbytes + ALIGNMENT_NBYTES * len(whole)
    assert plan.host.nbytes < both.host.nbytes and "over peer: the parts of embeddings and heads" in str(plan)
    assert str(plan_of(LARGE, num_ranks=1, maps_memory=True)) == str(plan_of(LARGE, num_ranks=1))


def test_a_model_that_cannot_be_cut_is_refused_by_name() -> None:
    models = {"odd": replace(pooled()["plain"], config=replace(CONFIGS["plain"], num_kv_heads=1))}
    with pytest.raises(ValueError, match=r"model 'odd': .*num_kv_heads 1; use fewer ranks"):
        plan_pool(models, PoolOptions(1 << 30), num_ranks=2)


def test_a_plan_for_other_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"planned for 2 ranks, found 1: .*num_ranks=1"):
        ModelPool(plan_of(), models_of())


# --- tokens ---


def serve_turns(texts: dict[str, list[tuple[int, ...]]], asked: TransportName) -> tuple[Any, Any]:
    pool = rank_pool(max_turn_steps=5, asked=asked)
    assert pool.plan.maps_memory is (asked == "peer")
    done = pool.generate({name: requests(found) for name, found in texts.items()})
    return tokens(done), facts(pool)


@pytest.mark.parametrize("asked", ["process_group", "peer"])
def test_models_over_two_ranks_asked_at_once_answer_as_they_do_alone(asked: TransportName) -> None:
    """With turns of a few steps, in the middle of which sequences are preempted, where only one or two models fit."""
    texts = {name: prompts(3, longest=30, seed=i) for i, name in enumerate(CONFIGS)}
    (first, did), (second, also) = run_ranks(serve_turns, texts, asked)
    assert first == second == {name: alone(name, found) for name, found in texts.items()}
    assert did == also
    assert len(did[0]) > 6 and max(preempted for _, preempted in did[2]) > 0


def draw_alone_and_together(pool: ModelPool, seed: int) -> None:
    texts = {name: prompts(2, longest=12, seed=seed) for name in CONFIGS}
    done = pool.generate({name: requests(found) for name, found in texts.items()})
    assert tokens(done) == {name: alone(name, found) for name, found in texts.items()}


# --- what ranks see at different times ---


class LateStreams(InOrder):
    """Streams whose copies are seen to have arrived after so many looks."""

    def __init__(self, num_looks: int) -> None:
        self.num_looks = num_looks

    def is_complete(self, event: Event) -> bool:
        self.num_looks -= 1
        return self.num_looks < 0


def serve_with_late_copies() -> tuple[list[bool], list[int], Any]:
    """Of ranks that see copies arrive at other times: whether units arrive, asked again and again; and bytes."""
    seen: list[bool] = []
    moved: list[int] = []
    is_arriving = PooledWeights.is_arriving

    def noting(weights: PooledWeights) -> bool:
        seen.append(is_arriving(weights))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "streams_of", lambda device: LateStreams(30 * dist.get_rank()))
        patch.setattr(PooledWeights, "is_arriving", noting)
        pool = rank_pool(LARGE, max_turn_steps=10_000)
        pool.load_all()
        pool.add("plain", Request("a", prompts(1)[0], GREEDY, max_tokens=20))
        while pool.has_work:
            pool.step()
            moved.append(pool.prefetch("windows"))
        assert pool.wake_up("windows").nbytes == 0
        draw_alone_and_together(pool, seed=1)
        return seen, moved, facts(pool)


def test_a_unit_has_arrived_once_it_has_on_all_ranks() -> None:
    """Prevents: a step that one rank replays and another issues, and prefetches that differ."""
    first, second = run_ranks(serve_with_late_copies)
    assert first == second
    seen, moved, _ = first
    assert {*seen} == {True, False}
    assert moved.count(0) > 3 and sum(moved) > 0


def on_last_rank(model: Model, act: Callable[[], None]) -> Model:
    """Whose values the last rank gets behind ``act``."""

    def source(device: torch.device) -> Source:
        if dist.get_rank() == dist.get_world_size() - 1:
            act()
        return model.source(device)

    return replace(model, source=source)


def load_late() -> tuple[int, Any]:
    models = models_of()
    models["plain"] = on_last_rank(models["plain"], lambda: time.sleep(0.2))
    pool = rank_pool(models=models)
    pool.start_loading("plain")
    num_steps, had_news = 0, False
    while pool.states()["plain"] is ModelState.LOADING:
        had_news |= pool.has_news
        pool.step()
        num_steps += 1
    assert had_news or dist.get_rank() == 1, "the first rank waits for the other"
    pool.load("windows")
    draw_alone_and_together(pool, seed=0)
    return num_steps, facts(pool)


@pytest.mark.slow
def test_a_model_is_loaded_once_it_is_on_all_ranks() -> None:
    first, second = run_ranks(load_late)
    assert first == second


def fail_on_one_rank() -> tuple[str, list[str], Any]:
    def fail() -> None:
        raise OSError("the disk is gone")

    models = models_of()
    models["plain"] = on_last_rank(models["plain"], fail)
    pool = rank_pool(models=models)
    pool.add("plain", Request("a", (1, 2, 3), GREEDY, max_tokens=4))
    ((name, output),) = [told for _ in range(10**4) if pool.has_work for told in pool.step()]
    assert (name, output.finish, pool.states()["plain"]) == ("plain", FinishReason.FAILED, ModelState.FAILED)
    with pytest.raises((OSError, RuntimeError), match="the disk is gone"):
        pool.load("plain")
    pool.load("windows")
    held = [image.name for image in pool._loads._host_weights._images]
    return str(output.error), held, facts(pool)


def test_a_load_that_fails_on_one_rank_has_failed_on_all_and_frees_its_bytes() -> None:
    (words, *first), (own, *second) = run_ranks(fail_on_one_rank)
    assert words == "model 'plain' could not be loaded: AgreedError: the disk is gone (rank 1)"
    assert own == "model 'plain' could not be loaded: OSError: the disk is gone"
    assert first == second and first[0] == ["windows"]


def load_watched() -> tuple[list[str], Any]:
    """Why models could not be loaded where the first rank fails to show how they are; then they are asked."""

    def show(name: str, figures: object) -> None:
        if name == "plain" and dist.get_rank() == 0:
            raise BrokenPipeError("nobody looks")

    def read_late(device: torch.device) -> Source:
        time.sleep(0.05)
        return plain.source(device)

    models = models_of()
    plain = models["plain"]
    pool = rank_pool(models={**models, "plain": replace(plain, source=read_late)})
    failed = pool.load_all(show)
    states = [state.value for state in pool.states().values()]
    draw_alone_and_together(pool, seed=0)
    found = facts(pool)
    pool.close()
    return [f"{name}: {type(error).__name__}: {error}" for name, error in failed.items()], (states, found)


def test_where_who_watches_a_load_fails_all_ranks_leave_it_and_load_the_others() -> None:
    """Prevents: ranks of which one waits for a load on, and others do what comes next."""
    (own, first), (words, second) = run_ranks(load_watched)
    assert own == ["plain: BrokenPipeError: nobody looks"]
    assert words == ["plain: AgreedError: nobody looks (rank 0)"]
    assert first == second and first[0] == ["absent", "asleep", "asleep"]


def call_otherwise() -> str:
    pool = rank_pool()
    if dist.get_rank():
        with pytest.raises(RuntimeError, match=r"expected the time from the first rank"):
            pool.ranks.clock()
        with pytest.raises(RuntimeError, match=r"expected a call of the first rank's pool"):
            follow_pool(pool)
    else:
        TPPool(pool).cancel("plain", "nobody")
        pool.ranks.clock()
    with pytest.raises(RuntimeError, match=r"exchange different things") as error:
        if dist.get_rank():
            pool.load("plain")
        else:
            pool.start_loading("plain")
            pool.step()
    return str(error.value)


def test_ranks_that_make_different_calls_all_say_so() -> None:
    first, second = run_ranks(call_otherwise)
    assert first == second and "rank 0 the ends of loads, rank 1 the wait for a load" in first


def serve_by_targets() -> Any:
    """On ranks of which the second has another clock, and takes its time."""
    names, step = [*CONFIGS], ModelPool.step
    texts = {name: prompts(3, longest=20, seed=i) for i, name in enumerate(names)}

    def slow_step(pool: ModelPool) -> Any:
        time.sleep(0.002 * dist.get_rank())
        return step(pool)

    with pytest.MonkeyPatch.context() as patch:
        clock = time.monotonic
        patch.setattr(time, "monotonic", lambda: clock() * (1 + 3 * dist.get_rank()))
        patch.setattr(ModelPool, "step", slow_step)
        targets = dict.fromkeys(names, Targets(0.2, 0.01))
        pool = ModelPool(plan_of(admission_load=None), models_of(), targets=targets)
        done = pool.generate({name: requests(found) for name, found in texts.items()})
    assert tokens(done) == {name: alone(name, found) for name, found in texts.items()}
    return facts(pool)


@pytest.mark.slow
def test_turns_by_targets_go_by_the_first_ranks_clock() -> None:
    first, second = run_ranks(serve_by_targets)
    assert first == second and len(first[0]) > 3


def lead_by_targets() -> tuple[Any, list[int]]:
    """Of ranks with their own clocks, of which one is asked: switches and what was learned; broadcasts of each step."""
    names, told, broadcast = [*CONFIGS], list[object](), TPGroup.broadcast

    def noting(group: TPGroup, value: Any) -> Any:
        told.append(value)
        return broadcast(group, value)

    with pytest.MonkeyPatch.context() as patch:
        clock = time.monotonic
        patch.setattr(time, "monotonic", lambda: clock() * (1 + 3 * dist.get_rank()))
        patch.setattr(TPGroup, "broadcast", noting)
        pool = ModelPool(plan_of(admission_load=None), models_of(), targets=dict.fromkeys(names, Targets(0.2, 0.01)))
        nums: list[int] = []
        if dist.get_rank():
            follow_pool(pool)
        else:
            driver = PoolDriver(pool)
            driver.load_all()
            for name in names:
                driver.add(Request(name, prompts(1)[0], GREEDY, max_tokens=12, model=name))
            while driver.has_work:
                told.clear()
                driver.step()
                nums.append(len(told))
            driver.close()
    queues = pool.turns.scheduler.queues.values()
    return ([*pool.switches], [(queue.step_s, queue.times.prefill_s(8)) for queue in queues]), nums


def test_a_step_by_targets_broadcasts_its_call_with_the_time_and_its_end() -> None:
    (first, nums), (second, _) = run_ranks(lead_by_targets)
    assert first == second and len(first[0]) >= len(CONFIGS)
    assert len(nums) > 12 and {*nums} == {2}


# --- parts that are pulled ---


def switch_late() -> list[bool]:
    """Whether the embedding and the head are the decoder's after each switch.

    One rank copies late, then pulls late: from a tied model, whose bytes the other rank is about to overwrite.
    """
    modules, found = {name: copy.deepcopy(decoder(config)) for name, config in CONFIGS.items()}, []
    for number, module in enumerate(modules.values(), 1):
        module.embed_tokens.weight.data.mul_(number)  # they begin with the same values, like all first values
    pool = rank_pool(models={name: model_of(module) for name, module in modules.items()}, asked="peer")
    pool.load_all()
    is_late = dist.get_rank() == 1

    def late(seconds: float, act: Callable[..., None], *arguments: Any) -> None:
        time.sleep(seconds * is_late)
        act(*arguments)

    for name, copy_s, pull_s in (("plain", 0.03, 0), ("wide, tied", 0, 0.2), ("windows", 0.03, 0)):
        weights = pool._members[name].weights
        copy_in, pulls = weights.copy_in, weights._pulls
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "copy_in", partial(late, copy_s, copy_in))
            patch.setattr(weights, "_pulls", {unit: partial(late, pull_s, pull) for unit, pull in pulls.items()})
            assert pool.wake_up(name).nbytes > 0
        for unit in range(len(weights._units)):
            weights._acquire(unit)
        found += [torch.equal(weights.embedding(), modules[name].embed_tokens.weight)]
        found += [torch.equal(weights.head()[1], modules[name].lm_head.weight)]
    return found


def test_a_rank_pulls_what_others_have_copied_and_overwrites_what_they_have_pulled() -> None:
    assert run_ranks(switch_late) == [[True] * 6] * 2


def races_of_ranks(forgets: list[tuple[str, str]]) -> int:
    return len(races(forgets, partial(rank_pool, asked="peer")))


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", [None, (GATHER, HOST_TO_DEVICE), (COMPUTE, GATHER), (HOST_TO_DEVICE, COMPUTE)])
def test_pulls_are_ordered_by_events_on_each_rank(forgotten: tuple[str, str] | None) -> None:
    found = run_ranks(races_of_ranks, [] if forgotten is None else [forgotten])
    assert all(found) if forgotten else found == [0, 0]


# --- what must be the same ---


def differ(what: str) -> None:
    rank = dist.get_rank()
    pool = rank_pool(max_turn_steps=5 + rank if what == "plans" else 5)
    pool.generate({"plain": [Request("a", (1, 2, 3 + rank), GREEDY)]})


@pytest.mark.slow(unless=lambda what: what == "plans")
@pytest.mark.parametrize("what", ["plans", "requests"])
def test_ranks_that_differ_all_say_so(what: str) -> None:
    with pytest.raises(RankError) as failed:
        run_ranks(differ, what)
    assert len(failed.value.errors) == 2
    for kind, message in failed.value.errors.values():
        assert kind == "RuntimeError" and what in message and "those of [1] differ" in message


# --- one rank is asked ---


def lead(ttl_s: float) -> tuple[list[str], list[str], Any]:
    """What the first rank's driver answers and refuses, and what was done on this rank."""
    pool, refused, told = rank_pool(), list[str](), list[str]()
    if dist.get_rank():
        follow_pool(pool)
        return refused, told, [*pool.switches]
    now = 100.0
    driver = PoolDriver(pool, {"plain": ttl_s}, clock=lambda: now)
    assert driver.load_all() == {}

    def ask(name: str) -> None:
        driver.add(Request(f"{len(told)}", (1, 2, 3), GREEDY, max_tokens=12, model=name))
        found = [o for _ in range(10**4) if driver.has_work for o in driver.step()]
        assert [token.id for o in found for token in o.tokens] == alone(name, [(1, 2, 3)])["0"]
        told.append(pool.states()[name].value)

    def refuse(act: Callable[[], object]) -> None:
        with pytest.raises(ValueError, match=r".") as error:
            act()
        refused.append(str(error.value))

    ask("plain")
    refuse(lambda: driver.add(Request("b", (10**6,), GREEDY, model="plain")))
    refuse(lambda: driver.adapters_of("plain"))
    driver.add(Request("c", (1, 2), GREEDY, max_tokens=50, model="plain"))
    refuse(lambda: driver.unload("plain"))
    driver.cancel("c")
    driver.cancel("nobody")
    assert [o.finish for _ in range(100) if driver.has_work for o in driver.step()] == [FinishReason.CANCELLED]
    now += ttl_s + 1
    while driver.has_work:
        driver.step()
    told.append(pool.states()["plain"].value)
    driver.unload("plain")
    driver.load("plain")
    ask("plain")
    driver.wake_up("windows")
    driver.sleep("windows")
    driver.check_integrity()
    driver.close()
    return refused, told, [*pool.switches]


def test_what_is_asked_of_the_first_rank_is_done_on_all_and_refused_where_it_was_asked() -> None:
    (refused, told, first), (*_, second) = run_ranks(lead, 10.0)
    assert first == second and [switch.model for switch in first] == ["plain", "plain", "windows"]
    assert told == ["awake", "asleep", "awake"]
    assert [words.split(":")[-1][:24] for words in refused] == [
        " token 1000000 is outsid",
        " name them there",
        " cancel them, or wait fo"[:24],
    ]


def fail_on_the_one_that_follows() -> int:
    """How many of the calls that no rank refuses fail on the second rank; the first one makes nothing of them."""

    def fail(*_: object) -> list[object]:
        if dist.get_rank():
            raise ValueError("a fault of this rank")
        return []

    pool, num_failed = rank_pool(), 0
    with pytest.MonkeyPatch.context() as patch:
        for method in ("step", "load_all"):
            patch.setattr(ModelPool, method, fail)
        if dist.get_rank():
            for _ in range(2):
                with pytest.raises(ValueError, match="a fault of this rank"):
                    follow_pool(pool)
                num_failed += 1
        else:
            leader = TPPool(pool)
            leader.add("plain", Request("a", (1, 2, 3), GREEDY, max_tokens=4))
            leader.step()
            leader.load_all(lambda name, figures: None)
    return num_failed


def test_what_fails_in_a_step_or_a_load_of_a_rank_that_follows_ends_it() -> None:
    """Prevents: a rank that goes back to listening while the first one waits for it in a collective."""
    assert run_ranks(fail_on_the_one_that_follows) == [0, 2]


def wait_for_the_other_rank() -> tuple[int, float]:
    """How many steps the first rank makes, and for how long, while its load is over and the other's is not."""
    models = models_of()
    models["plain"] = on_last_rank(models["plain"], lambda: time.sleep(0.15))
    pool = rank_pool(models=models)
    if dist.get_rank():
        follow_pool(pool)
        return 0, 0.0
    driver, num_steps = PoolDriver(pool), 0
    driver.load("plain")
    began = time.perf_counter()
    while pool.states()["plain"] is ModelState.LOADING:
        if driver.has_work:
            driver.step()
            num_steps += 1
    seconds = time.perf_counter() - began
    driver.close()
    return num_steps, seconds


def test_a_load_that_is_over_on_the_first_rank_alone_is_looked_at_now_and_then() -> None:
    """Prevents: steps without a pause, each an exchange of all ranks."""
    (num_steps, seconds), _ = run_ranks(wait_for_the_other_rank)
    assert 1 <= num_steps <= seconds / LOOK_S + 1


# --- parts of parameters in pieces of host memory ---


@pytest.mark.parametrize("experts", [None, ExpertsConfig(5, 2)], ids=["dense", "experts"])
def test_a_part_that_is_read_in_pieces_is_the_part_that_is_read_at_once(experts: ExpertsConfig | None) -> None:
    """Of every unit, wherever an image is cut: in the middle of a matrix of which ranks have columns, too."""
    config = replace(TINY, experts=experts, qkv_bias=True)
    source = ModuleSource(decoder(config))
    for unit in stored_units(config, torch.float32, cuts_of(config, 2)):
        for rank in range(2):
            whole = torch.empty(unit.nbytes, dtype=torch.uint8)
            fill(Store(unit, 0, whole, rank), source)
            for step in (ALIGNMENT_NBYTES, 7 * ALIGNMENT_NBYTES):
                pieces = torch.zeros_like(whole)
                for start in range(0, unit.nbytes, step):
                    fill(Store(unit, start, pieces[start : start + step], rank), source)
                for parameter, segment in unit.parameters():
                    part = slice(segment.offset_nbytes, segment.end_nbytes)
                    assert torch.equal(pieces[part], whole[part]), (parameter.name, rank, step)


# --- on GPUs ---


def serve_on_gpus(asked: TransportName) -> tuple[Any, int]:
    """Models that take turns on two GPUs, and how many steps are recorded; nothing is allocated while they switch."""
    hardware = Hardware.of(torch.device("cuda"))
    models = pooled(replace(ONE, costs=None))
    transport = world_transport("cuda", asked)
    ranks = {"num_ranks": 2, "maps_memory": maps_slabs(transport)}
    wide = plan_pool(models, PoolOptions(64 << 30), hardware, **ranks)
    limit = wide.memory.nbytes - wide.grid.region_nbytes + wide.recordings_nbytes + SMALL
    plan = plan_pool(models, PoolOptions(limit, host_kv_nbytes=64 << 20, max_turn_steps=4), hardware, **ranks)
    pool = ModelPool(plan, models_of(), "cuda", transport=transport)
    assert plan.maps_memory is (asked == "peer")
    draw_alone_and_together(pool, seed=0)
    before = allocations()
    for _ in range(10):
        draw_alone_and_together(pool, seed=0)
    assert allocations() == before
    return facts(pool), sum(len(member.engine._runner._recordings) for member in pool._members.values())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*CUDA graphs do not fit")
@pytest.mark.parametrize("asked", ["process_group", "peer"])
def test_models_take_turns_on_two_gpus_and_answer_as_they_do_alone(asked: TransportName) -> None:
    (first, num_recorded), (second, _) = run_ranks(serve_on_gpus, asked, device="cuda", timeout=120)
    assert first == second and len(first[0]) > 20 and num_recorded > 0
