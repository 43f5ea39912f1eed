"""Images in prompts: transformers' numbers, however a prompt is cut, shared, preempted or evicted; encoded once."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.options import LoadOptions
from launch.plan_serve import ServePlanOptions, forecast_serving
from tests.llava import IMAGE_TOKEN, NUM_ROWS, greedy_of, logits_of, pixels_of, save_llava
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.image_tokens import Image, ImageToken, PlacedImage, place_images
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.kv.eviction import Costs
from yafsdp_like.inference.kv.kv_cache import Tier
from yafsdp_like.inference.options import EngineOptions, PoolOptions
from yafsdp_like.inference.plan.draft_plan import plan_with_draft
from yafsdp_like.inference.plan.serving_plan import plan_serving
from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import Model, open_model, random_model
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.memory.plan import readable
from yafsdp_like.models import DecoderConfig
from yafsdp_like.models.vision import PROJECTOR, TOWER

pytest.importorskip("transformers")

GREEDY = SamplingParams(temperature=0.0)
OPTIONS = EngineOptions(kv_nbytes=1 << 20, max_batch_size=4, max_batch_tokens=64, page_size=4, max_seq_len=128)
CUT = replace(OPTIONS, max_batch_tokens=6)  # of NUM_ROWS rows
BEFORE, AFTER = (5, 9, 17), (23, 42, 7)
SWAPPING = Costs(link_nbytes_per_s=1e12, prefill_tokens_per_s=1.0)


class Llava:
    """A small model as transformers has it, and as it is served."""

    def __init__(self, directory: Path, kind: str, **more: Any) -> None:
        self.theirs = save_llava(directory, kind, **more)
        self.model = open_model(str(directory))

    def engine(self, options: EngineOptions = OPTIONS) -> Engine:
        return Engine.load(self.model, options)

    def request(self, name: str, tokens: tuple[int, ...], *seeds: int, max_tokens: int = 6, **more: Any) -> Request:
        """An image token of ``tokens`` stands for each of the images of ``seeds``."""
        assert self.model.config.vision is not None
        prompt, images = place_images(tokens, [Image.of(pixels_of(seed)) for seed in seeds], self.model.config.vision)
        return Request(name, prompt, GREEDY, max_tokens, images=images, **more)

    def expected(self, request: Request) -> list[int]:
        pixels = [placed.image.pixels for placed in request.images]
        return greedy_of(self.theirs, [int(token) for token in request.prompt], pixels, request.max_tokens)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Llava:
    return Llava(tmp_path_factory.mktemp("clip"), "clip")


@pytest.fixture(scope="module")
def same_tower(tmp_path_factory: pytest.TempPathFactory) -> Llava:
    """Another decoder and projector, of other sizes, behind the same tower."""
    return Llava(tmp_path_factory.mktemp("same"), "clip", seed=5, hidden_size=32, num_hidden_layers=3)


@pytest.fixture(scope="module")
def other_tower(tmp_path_factory: pytest.TempPathFactory) -> Llava:
    return Llava(tmp_path_factory.mktemp("other"), "clip", tower_seed=9)


def check_idle(it: Engine) -> None:
    it.check_integrity()
    assert it.metrics().kv_nbytes_used == 0


ONE = (*BEFORE, IMAGE_TOKEN, *AFTER)
TWO = (IMAGE_TOKEN, *BEFORE, IMAGE_TOKEN, *AFTER)


@pytest.mark.slow(unless=lambda kind, options: kind == "clip" or options is OPTIONS)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(("tokens", "seeds"), [(ONE, (1,)), (TWO, (1, 2))], ids=["one image", "two images"])
@pytest.mark.parametrize("options", [OPTIONS, CUT], ids=["whole", "cut"])
def test_logits_and_greedy_tokens_are_those_of_transformers(
    kind: str, tokens: tuple[int, ...], seeds: tuple[int, ...], options: EngineOptions, tmp_path: Path
) -> None:
    it = Llava(tmp_path, kind)
    request, engine = it.request("a", tokens, *seeds), it.engine(options)
    first = engine.generate([replace(request, id="first", max_tokens=1)])["first"].ids
    pixels = [placed.image.pixels for placed in request.images]
    expected = logits_of(it.theirs, [int(token) for token in request.prompt], pixels)[-1]
    torch.testing.assert_close(engine._places.buffers.logits.logits[0], expected, rtol=1e-4, atol=1e-4)
    engine.cache.pools[Tier.DEVICE].clear()
    assert engine.generate([request])["a"].ids == it.expected(request)
    assert first == it.expected(request)[:1]
    check_idle(engine)


def test_an_image_is_encoded_once_and_its_prefix_found_with_the_same_image_only(llava: Llava) -> None:
    it = llava.engine()
    requests = [llava.request("first", ONE, 1), llava.request("again", ONE, 1), llava.request("other", ONE, 2)]
    done = {request.id: it.generate([request])[request.id] for request in requests}
    assert {name: completion.ids for name, completion in done.items()} == {r.id: llava.expected(r) for r in requests}
    assert [done[name].num_cached_tokens for name in ("first", "again", "other")] == [0, 20, 0]
    assert it.metrics().num_images_encoded == 2
    without_prefix = llava.request("behind", (11, *ONE), 1)
    assert it.generate([without_prefix])["behind"].ids == llava.expected(without_prefix)
    metrics = it.metrics()
    assert (metrics.num_images_encoded, metrics.num_images_found) == (2, 1)  # "again" computes none of the image's rows
    check_idle(it)


def test_features_of_an_image_are_found_with_the_same_salt_only(llava: Llava) -> None:
    """Prevents: time to the first token telling whether somebody else has sent an image."""
    it = llava.engine()
    counts = []
    for number, salt in enumerate(["mine", "yours", None, "mine"]):
        request = llava.request(f"{number}", (number, *ONE), 1, max_tokens=1, salt=salt)
        assert it.generate([request])[request.id].ids == llava.expected(request)
        counts.append((it.metrics().num_images_encoded, it.metrics().num_images_found))
    assert counts == [(1, 0), (2, 0), (3, 0), (3, 1)]
    check_idle(it)


def test_requests_with_images_and_without_share_steps(llava: Llava) -> None:
    it = llava.engine(replace(OPTIONS, max_batch_tokens=24))
    requests = [
        llava.request("image", ONE, 3, max_tokens=9),
        llava.request("text", (*BEFORE, *AFTER), max_tokens=9),
        llava.request("images", TWO, 4, 3, max_tokens=9),
    ]
    done = it.generate(requests)
    assert {name: completion.ids for name, completion in done.items()} == {r.id: llava.expected(r) for r in requests}
    assert it.metrics().num_images_encoded == 2
    check_idle(it)


@pytest.mark.parametrize("swaps", [False, True], ids=["recompute", "swap"])
def test_a_preemption_in_the_middle_of_an_image_changes_no_token(swaps: bool, llava: Llava) -> None:
    more: dict[str, Any] = {"host_kv_nbytes": 1 << 20, "costs": SWAPPING} if swaps else {}
    it = llava.engine(replace(CUT, lookahead=False, prefix_cache=False, **more))
    request = llava.request("a", ONE, 1)
    it.add(request)
    it.step()
    it.step()
    (running,) = it._scheduler.running
    (placed,) = request.images
    assert placed.start < running.num_scheduled < placed.end
    it.suspend()
    drawn = [token.id for output in run_all(it) for token in output.tokens]
    assert drawn == llava.expected(request)
    metrics = it.metrics()
    assert (metrics.num_swapped_out, metrics.num_recomputed) == ((1, 0) if swaps else (0, 1))
    assert metrics.num_images_encoded == 1
    check_idle(it)


def run_all(it: Engine) -> Iterator[Any]:
    while it.has_work:
        yield from it.step()


def test_images_are_evicted_as_prefixes_are_and_encoded_again(llava: Llava) -> None:
    it = llava.engine(replace(OPTIONS, kv_nbytes=1 << 16, max_seq_len=100))
    first = llava.request("first", ONE, 1)
    it.generate([first])
    for number in range(8):
        long = Request(f"long {number}", tuple((number * 31 + i) % 97 for i in range(90)), GREEDY, 4)
        it.generate([long])
    again = replace(first, id="again")
    assert it.generate([again])["again"].ids == llava.expected(first)
    assert it.metrics().num_images_encoded == 2
    check_idle(it)


def test_debug_mode_knows_pages_that_images_take_while_a_step_is_issued(llava: Llava) -> None:
    """Prevents: a page that an image lost, poisoned then, being called written when another image has it."""
    it = llava.engine(replace(OPTIONS, debug=True, prefix_cache=False))
    for seed in (1, 2, 3):
        first, second = llava.request(f"first {seed}", ONE, seed), llava.request(f"second {seed}", (*AFTER, *BEFORE))
        done = it.generate([first]) | it.generate([second])
        assert {name: each.ids for name, each in done.items()} == {r.id: llava.expected(r) for r in (first, second)}
        kept = llava.request(f"kept {seed}", ONE, 7)  # so that the slab stays lent
        assert it.generate([kept])[kept.id].ids == llava.expected(kept)
        pool = it.cache.pools[Tier.DEVICE]
        (shape,) = [shape for shape in pool.stocks if shape.num_planes == 1]
        for page in list(pool.stocks[shape].victims)[:1]:
            pool._evict(shape, [page])
        it.generate([replace(second, id=f"poisons {seed}")])
    check_idle(it)


def test_an_image_without_a_page_is_encoded_where_it_is_needed(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    it = llava.engine(CUT)
    monkeypatch.setattr(it._runner._images._pages, "put", lambda content, tenant: None)  # type: ignore[union-attr]
    request = llava.request("a", ONE, 1)
    assert it.generate([request])["a"].ids == llava.expected(request)
    assert it.metrics().num_images_encoded == 4  # once for each part of the prompt that has some of its rows
    check_idle(it)


def pool_of(**models: Llava) -> ModelPool:
    options = replace(OPTIONS, kv_nbytes=None)
    plan = plan_pool(
        {name: PooledModel(it.model.config, torch.float32, options) for name, it in models.items()},
        PoolOptions(memory_limit_nbytes=4 << 20),
    )
    return ModelPool(plan, {name: it.model for name, it in models.items()})


def test_models_of_one_tower_encode_an_image_once(llava: Llava, same_tower: Llava, other_tower: Llava) -> None:
    with pool_of(one=llava, same=same_tower, other=other_tower) as pool:
        models = {"one": llava, "same": same_tower, "other": other_tower}
        requests = {name: [it.request("a", ONE, 1), it.request("b", TWO, 1, 2)] for name, it in models.items()}
        done = {}
        for name in requests:  # one after the other
            done |= pool.generate({name: requests[name]})
        for name, it in models.items():
            assert {r.id: done[name][r.id].ids for r in requests[name]} == {
                r.id: it.expected(r) for r in requests[name]
            }
        counts = {name: pool.engine(name).metrics() for name in models}
        assert [counts[name].num_images_encoded for name in models] == [2, 0, 2]
        assert counts["same"].num_images_found >= 2
        pool.check_integrity()


def test_a_model_that_slept_and_woke_finds_its_images(llava: Llava) -> None:
    with pool_of(one=llava) as pool:
        request = llava.request("a", ONE, 1)
        pool.generate({"one": [request]})
        pool.sleep("one", keep=False)
        again = llava.request("b", (11, *ONE), 1)
        assert pool.generate({"one": [again]})["one"]["b"].ids == llava.expected(again)
        assert pool.engine("one").metrics().num_images_encoded == 1
        pool.check_integrity()


def test_the_plan_has_the_tower_the_projector_and_what_an_image_takes(llava: Llava) -> None:
    config = llava.model.config
    assert config.vision is not None
    plan, text = (plan_serving(each, OPTIONS) for each in (config, replace(config, vision=None)))
    tower = sum(torch.Size(shape).numel() for shape in config.vision.tower_shapes().values())
    regions = {region.name: region.nbytes for region in plan.memory.regions}
    assert 2 * tower <= regions[TOWER] < 2 * tower + 256 * len(config.vision.tower_shapes())
    assert plan.memory.nbytes - text.memory.nbytes == regions[TOWER] + regions[PROJECTOR]
    assert plan.buffers.image_nbytes == config.vision.activation_nbytes(config.dim, 2) > 0 == text.buffers.image_nbytes
    it = llava.engine()
    assert it._weights.arena.nbytes == it.plan.nbytes
    asked = ServePlanOptions(llava.model.name, load=LoadOptions(device="cpu", dtype="bfloat16"), engine=OPTIONS)
    assert f"of the weights, {readable(regions[TOWER])} are the vision tower's" in str(forecast_serving(asked))


def test_a_draft_model_is_planned_without_its_tower(llava: Llava) -> None:
    """Prevents: a tower loaded for drafts, which are shown no image, and bytes that no plan has."""
    config, options = llava.model.config, replace(OPTIONS, speculate="draft:it")
    drafts = plan_with_draft(config, options, draft=config).draft
    assert drafts is not None and drafts.buffers.image_nbytes == 0
    assert not {TOWER, PROJECTOR} & {region.name for region in drafts.memory.regions}
    it = Engine.load(llava.model, options, draft=llava.model)
    request = llava.request("a", ONE, 1)
    assert it.generate([request])["a"].ids == llava.expected(request)


def test_images_that_a_model_cannot_see_are_refused(llava: Llava) -> None:
    it, request = llava.engine(), llava.request("a", ONE, 1)
    vision = llava.model.config.vision
    assert vision is not None
    with pytest.raises(ValueError, match="for each of 2 images, found 1"):
        llava.request("b", ONE, 1, 2)
    with pytest.raises(ValueError, match="expected pixels"):
        place_images(ONE, [Image.of(torch.zeros(3, 8, 8))], vision)
    for broken in (
        replace(request, prompt=tuple(int(token) for token in request.prompt)),
        replace(request, images=(replace(request.images[0], start=2),)),
        replace(request, images=(PlacedImage(Image.of(pixels_of(2)), 3, NUM_ROWS),)),
    ):
        with pytest.raises(ValueError, match="request 'a': expected 16 tokens of the image"):
            it.add(broken)
    text_only: Model = random_model("text", DecoderConfig(32, 1, 4, 2, 64, vocab_size=128, max_seq_len=128))
    with pytest.raises(ValueError, match="the model takes no images"):
        Engine.load(text_only, OPTIONS).add(request)
    assert it.generate([request])["a"].ids == llava.expected(request)


def test_tokens_of_an_image_are_numbers_that_equal_none_of_another() -> None:
    one, same, other = ImageToken(7, b"one"), ImageToken(7, b"one"), ImageToken(7, b"other")
    assert one == same and hash(one) == hash(same) and one != other
    number = 7
    assert one != number and number != one, "whichever of the two is asked"
    assert torch.tensor([one, other]).tolist() == [7, 7]
    assert pickle.loads(pickle.dumps(one)) == one
