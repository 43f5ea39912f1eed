"""Many ranks: what an estimate for more GPUs than there are is based on, and that eight ranks do what two do.

The estimate's arithmetic is done by hand, its plans are those that ranks make, and for two GPUs it must lie near what
was measured. Sums and training run on 4 and 8 gloo ranks.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import estimate_scale
from bench.scale import (
    EASY,
    HARD,
    Assumptions,
    Case,
    Estimator,
    Figure,
    Topology,
    UnitShape,
    gather_of,
    num_copies,
    plan_for,
    reduction_of,
    ring,
    topologies,
)
from tests.comm.test_hierarchical import train_twins as train_twins_over_hosts
from tests.comm.test_hierarchical import world_of
from tests.comm.test_peer import train_by_both
from tests.ranks import on_ranks, run_ranks
from tests.training import Recipe, assert_close, train_unsharded
from tests.twins import Twins
from tests.zoo import SPECIMENS
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.comm.choice import transport_of
from yafsdp_like.comm.transport import Reduction
from yafsdp_like.memory import vmm
from yafsdp_like.memory.arena import MemoryBlock
from yafsdp_like.memory.plan import MemoryPlan
from yafsdp_like.models import PRESETS, Decoder

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
SLOW = pytest.mark.slow
CPU = torch.device("cpu")
TINY, LARGE = PRESETS["tiny"], PRESETS["8b"]
MIXED = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
TIMEOUT = 55.0


# --- the estimate's arithmetic ---


def figures(**values: float) -> Assumptions:
    """Round numbers for what is named, and no latency unless it is."""
    none = dict.fromkeys(("copy_gap", "barrier", "network_step"), 0.0)
    given = {name: Figure(value, "", "assumed") for name, value in (none | values).items()}
    return dataclasses.replace(Assumptions(), **given)  # type: ignore[arg-type]


UNIT = UnitShape(8000, 3)
RATES = figures(pull_rate=2000.0, ingress=1000.0, copy_gap=0.5, barrier=0.25, memory_rate=4000.0, network_rate=500.0)
HOST, HOSTS, REPLICAS = Topology("", 4), Topology("", 4, 2), Topology("", 4, 1, 2)


def test_a_gather_pulls_the_other_ranks_chunks_with_a_gap_for_each_copy() -> None:
    gather = gather_of(UNIT, HOST, RATES)
    assert (gather.link, gather.gaps) == (16000 * 3 / 4 / 1000, 9 * 0.5)
    assert (gather.network, gather.adding) == (0.0, 0.0)


def test_over_hosts_a_column_comes_first_and_each_host_of_it_is_a_copy() -> None:
    gather = gather_of(UNIT, HOSTS, RATES)
    assert gather.network == 16000 / 4 / 2 / 500
    assert gather.gaps == 2 * 9 * 0.5 + 2 * 0.25
    assert gather.stream == gather.link + gather.gaps + gather.network
    assert num_copies(UNIT, dataclasses.replace(HOSTS, strided_copies=True)) == 9


def test_a_reduction_adds_all_chunks_and_crosses_hosts_in_fp32() -> None:
    """The kernel reads a bf16 chunk of each rank and writes one in fp32."""
    inside, across, averaged = (reduction_of(UNIT, on, RATES) for on in (HOST, HOSTS, REPLICAS))
    assert inside.adding == 2000 * (4 * 2 + 4) / 4000
    assert (inside.gaps, inside.network) == (9 * 0.5 + 2 * 0.25, 0.0)
    assert across.network == 8000 / 2 / 500
    assert averaged.network == 2 * 8000 / 2 / 500


def test_a_ring_has_a_step_fewer_than_members() -> None:
    by = figures(network_rate=100.0, network_step=0.5)
    assert ring(800, 1, by) == 0.0
    assert ring(800, 4, by) == 3 * (200 / 100 + 0.5)


def estimated(on: Topology, by: Assumptions, case: Case = EASY, seq_len: int = 4096) -> Any:
    return Estimator(LARGE, seq_len, 0.4, case, by).step(on)


FREE = figures(pull_rate=1e30, ingress=1e30, memory_rate=1e30, network_rate=1e30)


def test_traffic_that_takes_no_time_leaves_the_unsharded_graph() -> None:
    for on in topologies(FREE):
        step = estimated(on, FREE)
        assert step.seconds == pytest.approx(0.4 * 0.981)
        assert (step.forward_bound, step.backward_bound) == ("compute", "compute")


def test_traffic_that_takes_longer_than_compute_is_what_a_step_lasts() -> None:
    """On two ranks half of everything is pulled: 30 gathers in forward, the same and all gradients in backward."""
    by = dataclasses.replace(FREE, ingress=Figure(1e9, "byte/s", "assumed"))
    step = estimated(Topology("", 2), by)
    head = 0.4 * 0.981 * 6 * 128256 * 4096 * 4096 / LARGE.train_flops(1, 4096)
    block, wide = LARGE.block_num_params / 1e9, 128256 * 4096 / 1e9
    assert (step.forward_bound, step.backward_bound) == ("link", "link")
    assert step.forward == pytest.approx(30 * block + head / 3)
    assert step.backward == pytest.approx(30 * block + 32 * block + wide + head * 2 / 3)
    assert step.end == pytest.approx(wide)


def test_early_gathers_show_only_where_the_update_is_too_short_to_hide_them() -> None:
    by = Assumptions()
    shown = [estimated(Topology("", 8, hosts), by).start for hosts in (1, 8, 32)]
    assert shown[0] == 0.0 < shown[1] < shown[2]


@pytest.mark.parametrize("seq_len", [1024, 2048, 4096, 8192])
def test_the_hard_case_is_never_shorter_than_the_easy_one(seq_len: int) -> None:
    for on in topologies(Assumptions()):
        easy, hard = (estimated(on, Assumptions(), case, seq_len) for case in (EASY, HARD))
        assert easy.forward <= hard.forward and easy.backward <= hard.backward


def test_every_assumption_says_whether_it_was_measured() -> None:
    found = [getattr(Assumptions(), field.name) for field in dataclasses.fields(Assumptions)]
    assert all(figure.source.split(":")[0].split(",")[0] in ("measured", "derived", "assumed") for figure in found)
    with pytest.raises(ValueError, match="no graph of the unsharded step was measured at T 512"):
        Assumptions().graph_saves(512)


def test_for_two_gpus_the_estimate_is_near_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Between the cases, or within 3 % of one, and memory within 1 %."""
    estimate_scale.main([])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["kind"].startswith("an estimate")
    assert [check["seq_len"] for check in report["checks"]] == [1024, 2048, 4096, 8192]
    for check in report["checks"]:
        assert check["easy_ratio"] * 0.99 <= check["measured_ratio"] <= check["hard_ratio"] * 1.03
        assert abs(check["device_error"]) < 0.01
    assert len(report["rows"]) == 4 * len(topologies(Assumptions()))


# --- plans on paper ---


def planned(transport: Any, num_hosts: int, policy: MixedPrecisionPolicy) -> MemoryPlan:
    """What this rank's part of a group plans for a model without memory."""
    group = world_of(num_hosts) if num_hosts > 1 else dist.new_group(backend="gloo")
    mesh = DeviceMesh.from_group(group, "cpu")
    with torch.device("meta"):
        model: Any = Decoder(TINY)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, transport=transport)
    return model.memory_plan()


@pytest.mark.parametrize(
    ("num_ranks", "num_hosts"), [(2, 1), (4, 1), (4, 2), pytest.param(8, 1, marks=SLOW), pytest.param(8, 2, marks=SLOW)]
)
def test_the_plan_on_paper_is_the_plan_of_ranks(
    num_ranks: int, num_hosts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    transport = "hierarchical" if num_hosts > 1 else "peer"
    plans = run_ranks(planned, transport, num_hosts, policy, world_size=num_ranks, timeout=TIMEOUT)
    monkeypatch.setattr(vmm, "GRANULE_NBYTES", 4096)  # as in the ranks of tests
    found = plan_for(TINY, Topology("", num_ranks // num_hosts, num_hosts), policy)
    for plan in plans:
        assert (found.world_size, found.regions, found.slots) == (plan.world_size, plan.regions, plan.slots)


# --- sums ---

NUMEL = 500  # of one rank's chunk


def gradients_of(rank: int, world_size: int, exact: bool) -> torch.Tensor:
    """`(world_size * NUMEL,)`: whole numbers, whose sum has no rounding, or magnitudes whose sum has much."""
    generator = torch.Generator().manual_seed(rank)
    numel = world_size * NUMEL
    if exact:
        return torch.randint(-1000, 1000, (numel,), generator=generator).float()
    magnitudes = 10.0 ** torch.randint(-3, 4, (numel,), generator=generator)
    return torch.randn(numel, generator=generator) * magnitudes


def reduced(transport_name: Any, gradients: torch.Tensor, staging_nbytes: int) -> torch.Tensor:
    """This rank's chunk of the mean."""
    transport = transport_of(dist.group.WORLD, CPU, transport_name)
    block = MemoryBlock.allocate(gradients.nbytes, CPU)
    if transport.mapped is not None:
        transport.mapped.connect([block])
    inputs = block.bytes.view(torch.float32)
    inputs.copy_(gradients)
    shard, scratch = torch.zeros(NUMEL), torch.empty(staging_nbytes, dtype=torch.uint8)
    transport.reduce_scatter([shard], [inputs], [torch.float32], scratch)(Reduction(), False)
    return shard


def compare_sums(staging_nbytes: int) -> None:
    """Both transports' means with each other and with the truth, whose error is a few roundings of what is added."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for exact in (True, False):
        everybody = [gradients_of(r, world_size, exact) for r in range(world_size)]
        chunks = torch.stack([g.view(world_size, NUMEL)[rank] for g in everybody]).double()
        truth, largest = chunks.mean(0), chunks.abs().mean(0)
        peers, group = (reduced(name, everybody[rank], staging_nbytes) for name in ("peer", "process_group"))
        if exact:
            assert torch.equal(peers, group) and torch.equal(peers, truth.float())
        else:
            error = world_size * torch.finfo(torch.float32).eps * largest
            assert ((peers - truth).abs() <= error).all() and ((group - truth).abs() <= error).all()
            assert ((peers - truth).abs() > 0).any(), "the numbers round nowhere, and so tell nothing"


@pytest.mark.parametrize("staging_nbytes", [7 * 256, 1 << 16])
@pytest.mark.parametrize("world_size", [4, pytest.param(8, marks=SLOW)])
def test_peers_and_the_process_group_give_the_same_sums_in_fp32(world_size: int, staging_nbytes: int) -> None:
    """Whole numbers to the bit, and others as far as the order of a sum goes; in rounds too."""
    run_ranks(compare_sums, staging_nbytes, world_size=world_size, timeout=TIMEOUT)


# --- training on eight ranks ---


def train_and_compare(names: Sequence[str], options: dict[str, Any]) -> None:
    for name in names:
        twins = Twins(SPECIMENS[name], **options)
        twins.train(0, 1, 2)
        twins.compare_parameters()


@SLOW
@pytest.mark.parametrize("name", ["odd", "nested", "decoder"])
def test_eight_ranks_over_peers_follow_the_unsharded_model(name: str) -> None:
    """Most ranks have no rows of some parameters of the first."""
    run_ranks(train_and_compare, [name], {"transport": "peer"}, world_size=8, timeout=TIMEOUT)


@SLOW
def test_eight_ranks_over_peers_train_like_one_and_like_the_process_group() -> None:
    """Losses, norms and parameters of eight steps of AdamW, with accumulation."""
    recipes = [Recipe(steps=8, micro_batches=2), Recipe(steps=4, precision=MIXED)]
    fp32, mixed = run_ranks(train_by_both, "nested", recipes, world_size=8, timeout=TIMEOUT)[0]
    assert_close(*fp32, tolerance=1e-4)
    assert_close(*mixed, tolerance=1e-2)
    assert_close(fp32[0], train_unsharded("nested", recipes[0], world_size=8), tolerance=1e-4)


@SLOW
@pytest.mark.parametrize("num_hosts", [2, 4])
def test_eight_ranks_of_several_hosts_follow_the_unsharded_model(num_hosts: int) -> None:
    run_ranks(train_twins_over_hosts, num_hosts, world_size=8, timeout=TIMEOUT)


@SLOW
@on_ranks(8, timeout=TIMEOUT)
def test_two_replicas_of_four_peers_follow_the_unsharded_model() -> None:
    mesh = DeviceMesh("cpu", torch.arange(8).view(2, 4), mesh_dim_names=("replicate", "shard"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.training.world_mesh", lambda: mesh)
        train_and_compare(["odd", "nested"], {"transport": "peer"})
