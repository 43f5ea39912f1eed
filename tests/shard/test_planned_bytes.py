"""Plans of whole models: hardly more than what is live at once, and to the byte what is held, whatever the model."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.laws.test_memory import storage_nbytes
from tests.ranks import alone_among, run_ranks
from yafsdp_like import MixedPrecisionPolicy, RemainderOffloadPolicy, fully_shard
from yafsdp_like.memory.layout import aligned
from yafsdp_like.memory.plan import SlotRequest, live_nbytes_peak
from yafsdp_like.models import PRESETS, Decoder

MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

# --- shapes that people train ---


class VisionEncoder(nn.Module):
    """Of patches (B, 3, 14 h, 14 w): planned here, never run."""

    def __init__(self, width: int = 1152, layers: int = 27) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 14, 14)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 16, 4304) for _ in range(layers))


class VisionLanguage(nn.Module):
    """A vision encoder, a projector, and a decoder whose layers are ten times as large as the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = VisionEncoder()
        self.projector = nn.Sequential(nn.Linear(1152, 4096), nn.GELU(), nn.Linear(4096, 4096))
        self.language = Decoder(PRESETS["8b"])


class Hybrid(nn.Module):
    """Embedding and head, and layers of three sizes in no regular order, some with experts of their own."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 2048)
        kinds = [3, 2, 2, 3, 1, 2, 2, 3, 1, 1, 3, 2] * 2
        self.layers = nn.ModuleList(nn.Linear(2048, 2048 * kind) for kind in kinds)
        for layer in self.layers[::4]:
            layer.experts = nn.ModuleList(nn.Linear(2048, 1024 * (1 + i % 3)) for i in range(12))
        self.head = nn.Linear(2048, vocab_size)


def vision_language() -> tuple[nn.Module, list[nn.Module]]:
    model = VisionLanguage()
    blocks = [*model.vision.layers, model.vision, model.projector, *model.language.layers, model.language]
    return model, blocks


def hybrid(vocab_size: int) -> tuple[nn.Module, list[nn.Module]]:
    model = Hybrid(vocab_size)
    experts = [expert for layer in model.layers[::4] for expert in layer.experts]
    return model, [model.embedding, *experts, *model.layers, model.head]


def decoder(preset: str) -> tuple[nn.Module, list[nn.Module]]:
    model = Decoder(PRESETS[preset])
    return model, list(model.layers)


SHAPES = {
    "llama 8b": lambda: decoder("8b"),
    "llama 70b": lambda: decoder("70b"),
    "mixture of experts": lambda: decoder("30b-a3b"),
    "vision encoder and decoder": vision_language,
    "huge embedding": lambda: hybrid(262_144),
    "unequal layers": lambda: hybrid(2048),
}


@pytest.mark.parametrize("name", SHAPES)
def test_slots_take_hardly_more_than_what_is_live_at_once(name: str) -> None:
    """At most 5 % above the bound that no placement can beat, for full parameters and for full gradients."""
    with alone_among(8):
        with torch.device("meta"):
            model, blocks = SHAPES[name]()
        for module in (*blocks, model):
            fully_shard(module, mp_policy=MIXED)
        plan = model.memory_plan()
    for kind in ("gather slots", "gradient slots"):
        least = live_nbytes_peak([SlotRequest(s.name, s.segment.nbytes, s.live) for s in plan.slots if s.kind == kind])
        assert least <= plan.nbytes_of(kind) <= 1.05 * least


# --- any model ---


@dataclass(frozen=True)
class Layer:
    """A layer that maps (N, width) to (N, width), and what of it is trained."""

    kind: str
    width: int
    is_frozen: bool
    has_child: bool  # a unit inside it
    is_unit: bool

    def build(self) -> nn.Module:
        inner = {
            "linear": lambda: nn.Linear(self.width, self.width),
            "narrow": lambda: nn.Sequential(nn.Linear(self.width, 1, bias=False), nn.Linear(1, self.width)),
            "norm": lambda: nn.LayerNorm(self.width),
            "experts": lambda: nn.Sequential(*(nn.Linear(self.width, self.width, bias=False) for _ in range(3))),
        }[self.kind]()
        module = nn.Sequential(inner, *([nn.Linear(self.width, self.width)] if self.has_child else []))
        return module.requires_grad_(not self.is_frozen)


@dataclass(frozen=True)
class Case:
    """A model, and how it is sharded."""

    layers: tuple[Layer, ...]
    dtype: torch.dtype
    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    transport: str
    reshards: bool | None
    split_master: bool
    offloads_remainder: bool  # if the master is split


def layers(width: int) -> st.SearchStrategy[tuple[Layer, ...]]:
    kinds = st.sampled_from(["linear", "narrow", "norm", "experts"])
    one = st.builds(Layer, kinds, st.just(width), st.booleans(), st.booleans(), st.booleans())
    return st.lists(one, min_size=1, max_size=6).map(tuple)


dtypes = st.sampled_from([None, torch.float32, torch.bfloat16])
cases = st.builds(
    Case,
    st.integers(1, 70).flatmap(layers),
    st.sampled_from([torch.float32, torch.bfloat16]),
    dtypes,
    dtypes,
    st.sampled_from(["process_group", "peer"]),
    st.sampled_from([None, True, False]),
    st.booleans(),
    st.booleans(),
).filter(lambda case: not case.split_master or (case.dtype, case.param_dtype) == (torch.float32, torch.bfloat16))


PHASES = [
    Phase.reuse,
    Phase.generate,
]  # a failure starts workers anew, which takes too long to search for a smaller one


settled = settings(deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.filter_too_much])
worlds = st.sampled_from([1, 2, 3])


@settings(settled, max_examples=12)
@given(cases, worlds)
def test_any_model_holds_what_its_plan_says_to_the_byte(case: Case, num_ranks: int) -> None:
    """Modules, dtypes, transports, depths and numbers of ranks at random: what was planned is what arenas hold."""
    run_ranks(hold_what_is_planned, case, world_size=num_ranks)


@pytest.mark.slow
@settings(settled, max_examples=150)
@given(cases, worlds)
def test_many_models_hold_what_their_plans_say_to_the_byte(case: Case, num_ranks: int) -> None:
    """More of the same."""
    run_ranks(hold_what_is_planned, case, world_size=num_ranks)


def hold_what_is_planned(case: Case) -> None:
    model: Any = nn.Sequential(*(layer.build() for layer in case.layers)).to(case.dtype)
    head: Any = nn.Linear(case.layers[0].width, 2).to(case.dtype)  # of the root, and always trained
    model.append(head)
    policy = MixedPrecisionPolicy(param_dtype=case.param_dtype, reduce_dtype=case.reduce_dtype)
    options: dict[str, Any] = {"mp_policy": policy, "transport": case.transport, "split_master": case.split_master}
    options["reshard_after_forward"] = case.reshards
    if case.split_master and case.offloads_remainder:
        options["offload_policy"] = RemainderOffloadPolicy()
    for layer, module in zip(case.layers, model, strict=False):
        if layer.has_child:
            fully_shard(module[-1], **options)
        if layer.is_unit:
            fully_shard(module, **options)
    fully_shard(model, **options)
    planned = model.memory_plan()
    for _ in range(2):
        model(torch.ones(3, head.in_features, dtype=case.dtype)).float().sum().backward()
        report = model.memory_report()
        assert model.memory_plan() == planned
        assert report.arena_nbytes == planned.nbytes == storage_nbytes(model)
        assert report.host_nbytes == planned.host_nbytes
        assert report.spills == ()
        assert gradient_nbytes(model) == planned.transient_nbytes
        model.zero_grad()
    assert gradient_nbytes(model) == 0


def gradient_nbytes(model: nn.Module) -> int:
    """What gradients take in PyTorch's allocator: each in a storage of its own, with the padding of its rows."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(aligned(grad.to_local().untyped_storage().nbytes()) for grad in grads)
