"""A pool of models against engines that have their models alone: the same tokens, whoever sleeps meanwhile."""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.clocks import RaceDetector, VectorClocks
from tests.inference.engine.test_engine import (
    GREEDY,
    RECOMPUTING,
    SWAPPING,
    TINY,
    decoder,
    expected,
    prompts,
    record_steps,
    requests,
)
from tests.inference.weights.test_weights import run_forward
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import FinishReason, Request
from yafsdp_like.inference.kv.eviction import Tenant
from yafsdp_like.inference.kv.kv_cache import Tier
from yafsdp_like.inference.options import EngineOptions, PoolOptions
from yafsdp_like.inference.pool import pool as pool_module
from yafsdp_like.inference.pool.host_weights import HostFullError, ModelUnavailableError
from yafsdp_like.inference.pool.member import ModelState
from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import Model, ModuleSource, load, model_of
from yafsdp_like.memory.streams import COMPUTE, HOST_TO_DEVICE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from yafsdp_like.inference.engine.request import Completion

ONE = EngineOptions(max_batch_size=4, max_batch_tokens=16, max_seq_len=64, page_size=4, costs=SWAPPING)
CONFIGS = {
    "plain": replace(TINY, num_layers=3),
    "windows": replace(TINY, num_layers=3, sliding_window=7, windowed_layers=(1,)),
    "wide, tied": replace(TINY, dim=48, custom_head_dim=12, qk_norm=True, tie_embeddings=True),
}
SMALL, LARGE = 280 << 10, 4 << 20  # room for one model, or for all


@functools.cache
def buffers_nbytes(options: EngineOptions = ONE) -> int:
    plan = plan_pool(pooled(options), PoolOptions(1 << 30))
    return plan.memory.nbytes - plan.grid.region_nbytes


def pooled(options: EngineOptions = ONE) -> dict[str, PooledModel]:
    return {name: PooledModel(config, torch.float32, options) for name, config in CONFIGS.items()}


def model_pool(slabs_nbytes: int = SMALL, options: EngineOptions = ONE, **more: Any) -> ModelPool:
    limit = buffers_nbytes(options) + slabs_nbytes
    plan = plan_pool(pooled(options), PoolOptions(limit, **{"host_kv_nbytes": 256 << 10, **more}))
    pool = ModelPool(plan, {name: model_of(decoder(config)) for name, config in CONFIGS.items()})
    assert (pool.arena.nbytes, pool.host.nbytes) == (plan.memory.nbytes, plan.host.nbytes)
    return pool


def tokens(done: dict[str, dict[str, Completion]]) -> dict[str, dict[str, list[int]]]:
    return {name: {key: completion.ids for key, completion in found.items()} for name, found in done.items()}


def alone(name: str, texts: list[tuple[int, ...]], num_tokens: int = 12) -> dict[str, list[int]]:
    return {str(i): expected(CONFIGS[name], text, num_tokens) for i, text in enumerate(texts)}


def check_idle(pool: ModelPool) -> None:
    assert not pool.has_work
    pool.check_integrity()


@pytest.mark.parametrize(
    ("slabs_nbytes", "costs", "lookahead"),
    [(SMALL, SWAPPING, True), (SMALL, RECOMPUTING, True), (SMALL, SWAPPING, False), (LARGE, SWAPPING, True)],
)
def test_models_asked_at_once_answer_as_they_do_alone(slabs_nbytes: int, costs: Any, lookahead: bool) -> None:
    """With turns of a few steps, in the middle of which sequences are preempted, where only one or two models fit."""
    pool = model_pool(slabs_nbytes, replace(ONE, costs=costs, lookahead=lookahead), max_turn_steps=5)
    texts = {name: prompts(6, longest=30, seed=i) for i, name in enumerate(CONFIGS)}
    done = pool.generate({name: requests(found) for name, found in texts.items()})
    assert tokens(done) == {name: alone(name, found) for name, found in texts.items()}
    assert (len(pool.switches) > 6) is (slabs_nbytes == SMALL)
    assert set(pool.states().values()) == (
        {ModelState.AWAKE} if slabs_nbytes == LARGE else {ModelState.AWAKE, ModelState.ASLEEP}
    )
    check_idle(pool)


def test_completions_of_a_pool_tell_all_that_those_of_one_engine_do() -> None:
    asked = [
        Request(str(i), text, GREEDY, max_tokens=4, num_logprobs=1, num_prompt_logprobs=2, wants_hidden=i == 1)
        for i, text in enumerate(prompts(2))
    ]
    done = model_pool(LARGE).generate({"plain": asked})["plain"]
    engine = Engine(load(model_of(decoder(CONFIGS["plain"])), replace(ONE, kv_nbytes=256 << 10)))
    assert done == engine.generate(asked)
    assert [len(each.prompt) for each in done.values()] == [len(request.prompt) for request in asked]
    assert [len(each.hidden) for each in done.values()] == [0, CONFIGS["plain"].dim]


def test_a_model_that_wakes_finds_the_prefixes_that_it_left_and_the_weights_that_nobody_overwrote() -> None:
    pool, text = model_pool(LARGE), prompts(1, longest=30)[0][:24] * 2
    first = pool.generate({"plain": requests([text])})["plain"]["0"]
    pool.sleep("plain")
    assert pool.states()["plain"] is ModelState.ASLEEP
    assert pool.wake_up("plain").nbytes == 0
    again = pool.generate({"plain": requests([text])})["plain"]["0"]
    assert first.ids == again.ids == expected(CONFIGS["plain"], text)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, (len(text) - 1) // 4 * 4)
    check_idle(pool)


def test_a_model_whose_home_was_taken_copies_all_units_and_still_finds_its_prefixes() -> None:
    pool, text = model_pool(SMALL), prompts(1, longest=30)[0][:24] * 2
    wakings = [pool.wake_up(name) for name in ("plain", "windows")]
    first = pool.generate({"plain": requests([text])})["plain"]["0"]
    pool.generate({"windows": requests([text])})
    again = pool.generate({"plain": requests([text])})["plain"]["0"]
    assert first.ids == again.ids and again.num_cached_tokens == (len(text) - 1) // 4 * 4
    assert [switch.nbytes for switch in wakings] == [pool.plan.models[n].image_nbytes for n in ("plain", "windows")]
    assert pool.switches[-1].nbytes == wakings[0].nbytes and pool.switches[-1].num_slept == 1


def test_pages_take_weights_of_a_sleeping_model_which_then_copies_just_these_units_again() -> None:
    pool = model_pool(600 << 10)
    for name in ("plain", "windows"):
        pool.wake_up(name)
    pool.sleep("windows")
    slabs = pool._pools[Tier.DEVICE].slabs
    home, written = pool.plan.models["windows"].home, list(slabs.num_written)
    shape = pool.plan.models["plain"].serving.groups[0].shape
    while slabs.num_written[home.start] == written[home.start]:
        assert pool._pools[Tier.DEVICE].take(shape) is not None
    changed = {slab for slab in home if slabs.num_written[slab] > written[slab]}
    assert changed == {home.start}
    plan = pool.plan.models["windows"]
    units = [unit for unit in range(len(plan.units)) if changed & set(plan.slabs_of(unit))]
    for page in [page for lease in slabs.leases.values() for page in lease.pages if page not in lease.free]:
        pool._pools[Tier.DEVICE].drop(shape, page)
    assert pool.wake_up("windows").nbytes == sum(plan.units[unit].nbytes for unit in units) > 0
    texts = prompts(4)
    assert tokens(pool.generate({"windows": requests(texts)})) == {"windows": alone("windows", texts)}


def test_a_thousand_switches_change_no_byte_of_arenas_no_token_and_no_book() -> None:
    pool, draw = model_pool(SMALL, max_turn_steps=3), random.Random(0)
    texts = {name: prompts(3, longest=12, seed=i) for i, name in enumerate(CONFIGS)}
    wanted = {name: alone(name, found, 4) for name, found in texts.items()}
    addresses = [region.data_ptr() for region in pool._regions.values()]
    num_switches = 0
    while num_switches < 1000:
        names = draw.sample(sorted(CONFIGS), draw.randint(1, 3))
        num_switches += sum(pool.wake_up(name).nbytes > 0 for name in names)
        if num_switches % 20 == 0:
            done = pool.generate({name: requests(texts[name], max_tokens=4) for name in names})
            assert tokens(done) == {name: wanted[name] for name in names}
            check_idle(pool)
    assert [region.data_ptr() for region in pool._regions.values()] == addresses


def test_a_model_in_waiting_is_prefetched_into_slabs_that_hold_no_page_in_use() -> None:
    """Where their homes do not meet, but there are not pages for both."""
    pool = model_pool(LARGE, max_turn_steps=10_000)
    pool.load_all()
    for request in requests(prompts(2), max_tokens=20):
        pool.add("plain", request)
    pool.step()
    assert pool.prefetch("windows") > 0
    while pool.prefetch("windows"):
        pool.step()
    assert pool.states()["windows"] is ModelState.ASLEEP
    pool.check_integrity()
    assert pool.wake_up("windows").nbytes == 0
    while pool.has_work:
        pool.step()
    texts = prompts(3)
    assert tokens(pool.generate({"windows": requests(texts)})) == {"windows": alone("windows", texts)}
    check_idle(pool)


def test_a_request_that_is_cancelled_while_its_model_sleeps_ends_without_waking_it() -> None:
    pool = model_pool(SMALL, max_turn_steps=10_000)
    pool.load_all()
    for name, key in (("plain", "a"), ("windows", "b")):
        pool.add(name, Request(key, (1, 2, 3), GREEDY, max_tokens=8))
    pool.step()
    pool.cancel("windows", "b")
    found = [(name, o.request_id, o.finish) for _ in range(20) if pool.has_work for name, o in pool.step() if o.finish]
    assert found == [("windows", "b", FinishReason.CANCELLED), ("plain", "a", FinishReason.LENGTH)]
    assert [switch.model for switch in pool.switches] == ["plain"]
    check_idle(pool)


# --- the order of streams ---


def races(forgets: Sequence[tuple[str, str]] = (), make_pool: Callable[[], ModelPool] = model_pool) -> list[str]:
    """Of forwards of models that take turns on the same bytes, and of pages that are written there between."""
    clocks = VectorClocks(forgets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "streams_of", lambda device: clocks)
        pool = make_pool()
    pool.load_all()
    region, pages = pool._regions[Tier.DEVICE], pool._pools[Tier.DEVICE]
    shape = pool.plan.models["plain"].serving.groups[0].shape
    detector = RaceDetector(clocks)
    detector.watch(region)

    def write_all_pages() -> None:
        taken = iter(lambda: pages.take(shape), None)
        for page in [page for page in taken if page is not None]:
            region[page * shape.nbytes : (page + 1) * shape.nbytes].fill_(1)
            pages.drop(shape, page)

    with detector:
        for name in ("plain", "windows", "wide, tied", "plain"):
            pool.wake_up(name)
            write_all_pages()
            for _ in range(2):
                run_forward(pool._members[name].weights, torch.Tensor.sum)
        pool.sleep("plain")
        write_all_pages()
        for name in ("windows", "plain"):
            assert pool.prefetch(name) > 0  # of the first some units are still on their way when their bytes are lost
            pool.wake_up("wide, tied")
            write_all_pages()
            pool.sleep("wide, tied")
            write_all_pages()
    return detector.races


def test_every_access_to_weights_and_pages_is_ordered_by_an_event() -> None:
    assert races() == []


@pytest.mark.parametrize("forgotten", [(COMPUTE, HOST_TO_DEVICE), (HOST_TO_DEVICE, COMPUTE)])
def test_a_wait_that_is_left_out_is_found(forgotten: tuple[str, str]) -> None:
    assert races([forgotten])


def test_all_steps_are_recordings_but_the_first_of_a_model_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording waits for no unit; no recording is made again. Here no event is ever known to be complete."""
    monkeypatch.setattr(pool_module, "streams_of", lambda device: VectorClocks())
    pool = model_pool(SMALL, max_turn_steps=4)
    recorders = {name: record_steps(member.engine, monkeypatch) for name, member in pool._members.items()}
    num_recorded = {name: len(recorder.recorded) for name, recorder in recorders.items()}
    texts = {name: prompts(3, longest=12, seed=i) for i, name in enumerate(CONFIGS)}
    done = pool.generate({name: requests(found) for name, found in texts.items()})
    assert tokens(done) == {name: alone(name, found) for name, found in texts.items()}
    for name, recorder in recorders.items():
        num_woken = sum(switch.model == name and switch.nbytes > 0 for switch in pool.switches)
        num_replayed = sum(work == "_step" for work, _ in recorder.replayed)
        assert pool._members[name].engine.metrics().num_steps - num_replayed == num_woken > 1
        assert len(recorder.recorded) == num_recorded[name]


# --- loading, and what is refused ---


def test_a_model_that_fails_to_load_is_reported_and_the_others_are_served() -> None:
    def broken(device: torch.device) -> Any:
        raise OSError("no such file")

    models = {name: model_of(decoder(config)) for name, config in CONFIGS.items()}
    models["windows"] = Model("windows", CONFIGS["windows"], None, broken)
    pool = ModelPool(plan_pool(pooled(), PoolOptions(buffers_nbytes() + SMALL)), models)
    assert {name: str(error) for name, error in pool.load_all().items()} == {"windows": "no such file"}
    assert pool.states() == {
        "plain": ModelState.ASLEEP, "windows": ModelState.FAILED, "wide, tied": ModelState.ASLEEP,
    }  # fmt: skip
    with pytest.raises(ModelUnavailableError, match="'windows' could not be loaded: OSError: no such file"):
        pool.add("windows", Request("a", (1,)))
    with pytest.raises(OSError, match="no such file"):
        pool.load("windows")
    texts = prompts(2)
    assert tokens(pool.generate({"plain": requests(texts)})) == {"plain": alone("plain", texts)}
    check_idle(pool)


def test_host_memory_is_limited_and_refuses_with_the_numbers_until_a_model_is_unloaded() -> None:
    nbytes = {name: plan.image_nbytes for name, plan in plan_pool(pooled(), PoolOptions(1 << 30)).models.items()}
    pool = model_pool(SMALL, host_weights_nbytes=nbytes["plain"] + nbytes["windows"])
    pool.load("plain")
    pool.load("windows")
    with pytest.raises(HostFullError, match=rf"'wide, tied' needs {nbytes['wide, tied']:,} bytes.* 0 are free \("):
        pool.load("wide, tied")
    pool.add("plain", Request("a", (1, 2), GREEDY, max_tokens=2))
    with pytest.raises(ValueError, match="model 'plain' has requests"):
        pool.unload("plain")
    while pool.has_work:
        pool.step()
    pool.unload("plain")
    assert pool.states()["plain"] is ModelState.ABSENT
    with pytest.raises(HostFullError, match=rf"{nbytes['plain']:,} are free \(bytes of other models: 'windows' "):
        pool.load("wide, tied")
    pool.unload("windows")
    texts = prompts(2)
    assert tokens(pool.generate({"wide, tied": requests(texts)})) == {"wide, tied": alone("wide, tied", texts)}
    pool.unload("wide, tied")
    assert tokens(pool.generate({"plain": requests(texts)})) == {"plain": alone("plain", texts)}
    check_idle(pool)


def test_a_model_that_is_loaded_again_with_other_values_finds_nothing_of_the_old_ones() -> None:
    """Neither weights on the device nor pages of a prompt that is asked again."""
    old = decoder(CONFIGS["plain"])
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.embed_tokens.weight.copy_(old.embed_tokens.weight.flip(0))
    current = [old]
    model = Model("plain", CONFIGS["plain"], None, lambda device: ModuleSource(current[0]))
    plan = plan_pool({"plain": pooled()["plain"]}, PoolOptions(buffers_nbytes() + LARGE))
    pool, (text, *_) = ModelPool(plan, {"plain": model}), long_texts()
    first = pool.generate({"plain": requests([text])})["plain"]["0"]
    pool.unload("plain")
    current[0] = new
    again = pool.generate({"plain": requests([text])})["plain"]["0"]
    assert again.num_cached_tokens == 0 and again.ids != first.ids
    fresh = ModelPool(plan, {"plain": model_of(new)}).generate({"plain": requests([text])})["plain"]["0"]
    assert again.ids == fresh.ids
    check_idle(pool)


def test_models_that_the_plan_does_not_know_are_refused() -> None:
    pool = model_pool(SMALL)
    with pytest.raises(ValueError, match=r"expected one of the models \['plain', 'windows', 'wide, tied'\], found 'x'"):
        pool.wake_up("x")
    with pytest.raises(ValueError, match=r"expected the plan's models"):
        ModelPool(pool.plan, {})
    others = {name: model_of(decoder(CONFIGS["plain"])) for name in CONFIGS}
    with pytest.raises(ValueError, match=r"windows: expected the model that was planned, DecoderConfig\("):
        ModelPool(pool.plan, others)


def test_each_request_is_checked_once_by_a_pool_and_by_an_engine_that_serves_it_to_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each check reads all of a prompt."""
    checked: list[str] = []

    def check(self: Engine, request: Request) -> None:
        checked.append(request.id)
        original(self, request)

    original = Engine.check
    monkeypatch.setattr(Engine, "check", check)
    pool, asked = model_pool(LARGE), requests(prompts(3))
    pool.generate({"plain": asked})
    Engine(load(model_of(decoder(CONFIGS["plain"])), replace(ONE, kv_nbytes=256 << 10))).generate(asked)
    assert sorted(checked) == sorted([request.id for request in asked] * 2)


# --- pages that several models want ---


def crowded(max_turn_steps: int = 10_000) -> ModelPool:
    """Room for all models, beside pages for a single long sequence."""
    wide = plan_pool(pooled(), PoolOptions(buffers_nbytes() + (600 << 10)))
    num_slabs = sum(len(plan.home) for plan in wide.models.values()) + max(map(wide.least_slabs, CONFIGS))
    pool = model_pool(num_slabs * wide.grid.slab_nbytes, max_turn_steps=max_turn_steps)
    assert pool.plan.grid.slab_nbytes == wide.grid.slab_nbytes
    assert not any(a.meets(b) for a in pool.plan.models.values() for b in pool.plan.models.values() if a is not b)
    return pool


def long_texts(seed: int = 0) -> list[tuple[int, ...]]:
    return [(*text, *range(45 - len(text)))[:45] for text in prompts(3, 45, seed)]


@pytest.mark.parametrize("has_floor", [True, False])
def test_a_model_with_a_floor_keeps_its_prefixes_while_another_fills_all_pages(has_floor: bool) -> None:
    floor = (Tenant("plain", floor_nbytes=32 << 10),) if has_floor else ()
    pool, text = model_pool(400 << 10, tenants=floor), long_texts()[0]
    pool.generate({"plain": requests([text])})
    for seed in range(8):
        pool.generate({"windows": requests(long_texts(seed + 1))})
    again = pool.generate({"plain": requests([text])})["plain"]["0"]
    assert again.ids == expected(CONFIGS["plain"], text)
    assert again.num_cached_tokens == (44 if has_floor else 0)
    check_idle(pool)


def test_idle_models_lose_their_memory_before_a_sequence_loses_its_pages() -> None:
    pool, texts = crowded(), long_texts()
    for name in ("windows", "plain", "wide, tied"):
        pool.wake_up(name)
    assert tokens(pool.generate({"plain": requests(texts)})) == {"plain": alone("plain", texts)}
    assert pool._members["plain"].engine.metrics().num_preempted == 0
    assert [name for name, state in pool.states().items() if state is ModelState.ASLEEP] == ["windows"]
    check_idle(pool)


def test_a_prefetched_model_loses_its_slabs_before_an_idle_one_and_is_not_prefetched_again() -> None:
    pool, texts = crowded(), long_texts()
    pool.load_all()
    pool.wake_up("plain")
    pool.wake_up("wide, tied")
    while pool.prefetch("windows"):
        pass
    assert pool._members["windows"].residence.owned
    assert tokens(pool.generate({"plain": requests(texts)})) == {"plain": alone("plain", texts)}
    assert pool._members["plain"].engine.metrics().num_preempted == 0
    assert not pool._members["windows"].residence.owned and not pool._may_prefetch
    assert pool.states()["wide, tied"] is ModelState.AWAKE
    check_idle(pool)


@pytest.mark.parametrize("max_turn_steps", [10_000, 4])
def test_models_that_have_work_give_way_to_one_that_cannot_go_on(max_turn_steps: int) -> None:
    """Each needs most pages that there are beside all weights: those that sleep for it wait for their turn."""
    pool, texts = crowded(max_turn_steps), {name: long_texts(i) for i, name in enumerate(CONFIGS)}
    for name in CONFIGS:
        pool.wake_up(name)
    pool.switches.clear()
    done = pool.generate({name: requests(found, max_tokens=18) for name, found in texts.items()})
    assert tokens(done) == {name: alone(name, found, 18) for name, found in texts.items()}
    assert 1 <= len(pool.switches) <= (4 if max_turn_steps == 10_000 else pool.num_steps / 4)
    check_idle(pool)


# --- anything, in any order ---


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 30))])
def test_whatever_is_asked_between_two_steps_every_answer_is_that_of_the_model_alone(seed: int) -> None:
    """Random sizes of memory; requests, cancellations, switches, prefetching, loading and unloading at random times."""
    draw = random.Random(seed)
    costs, slabs = draw.choice([SWAPPING, RECOMPUTING]), draw.choice([SMALL, SMALL + (100 << 10), 600 << 10, LARGE])
    options = replace(ONE, costs=costs, lookahead=draw.random() < 0.7, max_batch_size=draw.choice([2, 4]))
    pool = model_pool(slabs, options, max_turn_steps=draw.choice([2, 9]), host_kv_nbytes=draw.choice([0, 48 << 10]))
    texts = {name: prompts(4, longest=24, seed=i) for i, name in enumerate(CONFIGS)}
    wanted = {name: alone(name, found) for name, found in texts.items()}
    asked: dict[tuple[str, str], int] = {}
    drawn: dict[tuple[str, str], list[int]] = {}
    ended: dict[tuple[str, str], FinishReason] = {}

    def act(name: str) -> None:
        match draw.randrange(13):
            case 0 | 1 | 2:
                which = draw.randrange(4)
                key = str(len(asked))
                pool.add(name, Request(key, texts[name][which], GREEDY, max_tokens=draw.randint(1, 12)))
                asked[name, key] = which
            case 3:
                pool.wake_up(name)
            case 4:
                pool.sleep(name, keep=draw.random() < 0.7)
            case 5:
                pool.load(name)
                pool.prefetch(name)
            case 6 if asked:
                pool.cancel(*draw.choice([*asked]))
            case 7 if not pool._members[name].engine.has_work:
                pool.unload(name)
            case 8:
                pool.start_loading(name)

    def read() -> None:
        for name, output in pool.step():
            key = name, output.request_id
            drawn[key] = [*drawn.get(key, []), *(token.id for token in output.tokens)]
            if output.finish is not None:
                ended[key] = output.finish

    for _ in range(150):
        act(draw.choice([*CONFIGS]))
        if draw.random() < 0.6:
            read()
        pool.check_integrity()
    while pool.has_work:
        read()
    check_idle(pool)
    assert ended.keys() == asked.keys() and FinishReason.LENGTH in ended.values()
    for (name, key), which in asked.items():
        found = drawn[name, key]
        assert found == wanted[name][str(which)][: len(found)]
        assert found or ended[name, key] is FinishReason.CANCELLED
