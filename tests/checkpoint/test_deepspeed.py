"""ZeRO checkpoints of stages 1 to 3 fill a sharded model and its optimizer, and what is broken in them is named.

Files are made here in DeepSpeed's layout, and once more by DeepSpeed itself where it is installed.
"""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from tests.checkpoint import write_with_deepspeed
from tests.ranks import run_ranks
from yafsdp_like import fully_shard
from yafsdp_like.checkpoint.deepspeed import ZeroCheckpoint, load_deepspeed
from yafsdp_like.comm.consistency import AgreedError
from yafsdp_like.optim import AdamW

KINDS = ("weight", "exp_avg", "exp_avg_sq")
ROOT = Path(__file__).parents[2]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(7, 11), nn.BatchNorm1d(11), nn.Linear(11, 5), nn.Linear(5, 3)]
    model = nn.Sequential(*layers)
    model[3].bias.requires_grad_(False)
    return model


def expected_values(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Values by kind and name, each another number."""
    generator = torch.Generator().manual_seed(7)
    return {
        kind: {name: torch.rand(value.shape, generator=generator) for name, value in model.named_parameters()}
        for kind in KINDS
    }


def write_zero(path: Path, stage: int, world: int, subgroups: int = 2) -> dict[str, dict[str, Tensor]]:
    """Write what DeepSpeed would on `world` ranks for a model with two parameter groups; return the values."""
    model = make_model()
    values = expected_values(model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    groups = [[n for n, v in trained.items() if v.dim() > 1], [n for n, v in trained.items() if v.dim() == 1]]
    shapes = [{name: trained[name].shape for name in names} for names in groups]
    path.mkdir(parents=True)
    (path.parent / "latest").write_text(path.name)
    for rank in range(world):
        state = rank_state(values, groups, stage, world, rank, subgroups)
        torch.save({"optimizer_state_dict": state}, path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        frozen = values["weight"]["3.bias"]
        fragment = cut(frozen, world)[rank] if stage == 3 else frozen
        whole = {
            "module": {"1.running_mean": torch.full((11,), 3.0), "1.running_var": torch.ones(11)},
            "buffer_names": ["1.running_mean", "1.running_var"],
            "param_shapes": shapes,
            "frozen_param_shapes": {"3.bias": frozen.shape},
            "frozen_param_fragments": {"3.bias": fragment},
            "shared_params": {},
            "global_steps": 41,
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        if stage == 3 or rank == 0:
            torch.save(whole, path / f"{name}_model_states.pt")
    return values


def cut(value: Tensor, world: int) -> list[Tensor]:
    """As stage 3 does: equal pieces, the last ones padded."""
    each = math.ceil(value.numel() / world)
    padded = torch.cat([value.flatten(), torch.zeros(each * world - value.numel())])
    return list(padded.split(each))


def rank_state(
    values: dict[str, dict[str, Tensor]], groups: list[list[str]], stage: int, world: int, rank: int, subgroups: int
) -> dict[str, Any]:
    flat: dict[str, list[Tensor]] = {}
    for kind in KINDS:
        flat[kind] = []
        for names in groups:
            if stage == 3:
                pieces = [cut(values[kind][name], world)[rank] for name in names]
                step = math.ceil(len(pieces) / subgroups)
                flat[kind] += [torch.cat(pieces[i : i + step]) for i in range(0, len(pieces), step)]
            else:
                vector = torch.cat([values[kind][name].flatten() for name in names])
                each = math.ceil(vector.numel() / (2 * world)) * 2
                flat[kind].append(torch.cat([vector, torch.zeros(each * world - vector.numel())]).split(each)[rank])
    count = len(flat["weight"])
    state = {i: {"step": torch.tensor(41.0), **{k: flat[k][i] for k in KINDS[1:]}} for i in range(count)}
    inner = {"state": state, "param_groups": [{"lr": 1.0, "params": [i]} for i in range(count)]}
    common = {"zero_stage": stage, "partition_count": world if stage == 3 else [world, world]}
    if stage == 3:
        return {**common, "optimizer_state_dict": inner, "fp32_flat_groups": flat["weight"]}
    lengths = [sum(values["weight"][name].numel() for name in names) for names in groups]
    weights = [
        piece[: max(0, length - rank * len(piece))] for piece, length in zip(flat["weight"], lengths, strict=True)
    ]
    return {**common, "base_optimizer_state": inner, "single_partition_of_fp32_groups": weights}


def load_on_ranks(directory: Path, ours: bool) -> dict[str, dict[str, Tensor]]:
    """The values of a sharded model and its optimizer, whole, after they were loaded."""
    model = make_model()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    params = [value for value in model.parameters() if value.requires_grad]
    optimizer = AdamW(params, lr=0.5) if ours else torch.optim.AdamW(params, lr=0.5)
    assert load_deepspeed(model, optimizer, directory) == 41
    assert torch.equal(model[1].running_mean, torch.full((11,), 3.0))
    state: Any = get_optimizer_state_dict(model, optimizer)
    assert {float(entry["step"]) for entry in state["state"].values()} == {41.0}
    assert {group["lr"] for group in state["param_groups"]} == {0.5}
    found = {"weight": {name: value.full_tensor() for name, value in model.named_parameters()}}
    for kind in KINDS[1:]:
        found[kind] = {name: entry[kind].full_tensor() for name, entry in state["state"].items()}
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 3])
def test_values_of_each_stage_are_found_on_any_number_of_ranks(stage: int, world: int, tmp_path: Path) -> None:
    values = write_zero(tmp_path / "step41", stage, world)
    checkpoint = ZeroCheckpoint(tmp_path)
    assert set(checkpoint.names) == set(values["weight"]) and checkpoint.stage == stage
    for kind in KINDS:
        for name, value in values[kind].items():
            if kind == "weight" or name != "3.bias":
                assert torch.equal(checkpoint.read(name, kind), value), (kind, name)


@pytest.mark.parametrize(("stage", "ours"), [(2, True), (3, False)])
def test_a_sharded_model_and_its_optimizer_go_on_from_deepspeed(stage: int, ours: bool, tmp_path: Path) -> None:
    values = write_zero(tmp_path / "step41", stage, world=3)
    for found in run_ranks(load_on_ranks, tmp_path, ours):
        assert all(torch.equal(value, values["weight"][name]) for name, value in found["weight"].items())
        for kind in KINDS[1:]:
            assert len(found[kind]) == 7
            assert all(torch.equal(value, values[kind][name]) for name, value in found[kind].items())


def test_what_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    write_zero(tmp_path / "step41", stage=2, world=2)
    with pytest.raises(ValueError, match=r"has no '4\.weight' \(2 missing\)"):
        load_deepspeed(nn.Sequential(*make_model(), nn.Linear(3, 3)), None, tmp_path)
    other = make_model()
    other[2] = nn.Linear(11, 6)
    before = other[0].weight.clone()
    with pytest.raises(ValueError, match=r"'2\.weight' has shape \(6, 11\), and \(5, 11\)"):
        load_deepspeed(other, None, tmp_path)
    assert torch.equal(other[0].weight, before), "a model that does not fit is changed"
    other = make_model()
    other[1].register_buffer("running_mean", torch.zeros(3, 11))
    with pytest.raises(ValueError, match=r"'1\.running_mean' has shape \(3, 11\), and \(11,\)"):
        load_deepspeed(other, None, tmp_path)
    thawed = make_model().requires_grad_()
    with pytest.raises(ValueError, match=r"no moments of '3\.bias', which was frozen"):
        load_deepspeed(thawed, torch.optim.AdamW(thawed.parameters()), tmp_path)
    (tmp_path / "step41" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match=r"expected 2 files \*_optim_states.pt, found 1"):
        ZeroCheckpoint(tmp_path)
    with pytest.raises(ValueError, match="no directory"):
        ZeroCheckpoint(tmp_path, "step42")


def error_of_load(directories: list[Path]) -> tuple[str, bool]:
    """What this rank is told, and whether its model is as it was."""
    model = make_model()
    before = model[0].weight.clone()
    with pytest.raises(AgreedError) as raised:
        load_deepspeed(model, None, directories[dist.get_rank()])
    return str(raised.value), torch.equal(model[0].weight, before)


def test_a_file_that_one_rank_lacks_is_an_error_on_every_rank(tmp_path: Path) -> None:
    """Prevents: ranks that wait in a collective for one that has raised, where hosts have disks of their own."""
    directories = [tmp_path / "a", tmp_path / "b"]
    for directory in directories:
        write_zero(directory / "step41", stage=2, world=2)
    (directories[1] / "step41" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    for words, unchanged in run_ranks(error_of_load, directories):
        assert "expected 2 files *_optim_states.pt, found 1 (rank 1)" in words and unchanged


@pytest.mark.parametrize(
    "name", ["layer_0_expert_0_mp_rank_00_model_states.pt", "expp_rank_0_mp_rank_00_optim_states.pt"]
)
def test_files_of_experts_are_refused(name: str, tmp_path: Path) -> None:
    write_zero(tmp_path / "step41", stage=2, world=2)
    torch.save({}, tmp_path / "step41" / name)
    with pytest.raises(ValueError, match=f"{name} is of model or expert parallel ranks"):
        ZeroCheckpoint(tmp_path)


def test_groups_that_are_cut_for_other_numbers_of_ranks_are_refused(tmp_path: Path) -> None:
    write_zero(tmp_path / "step41", stage=2, world=2)
    for file in (tmp_path / "step41").glob("*optim_states.pt"):
        content = torch.load(file)
        content["optimizer_state_dict"]["partition_count"] = [2, 1]
        torch.save(content, file)
    with pytest.raises(ValueError, match=r"are cut for \[2, 1\] ranks"):
        ZeroCheckpoint(tmp_path)


class Calls:
    """Pickled, it makes a file when it is read; so does an object of a class that is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_the_files_is_run(tmp_path: Path) -> None:
    """DeepSpeed pickles its own classes beside the tensors, so that torch's restricted loader refuses the files."""
    values = write_zero(tmp_path / "step41", stage=2, world=1)
    file = next((tmp_path / "step41").glob("*optim_states.pt"))
    content = torch.load(file)
    content["optimizer_state_dict"]["loss_scaler"] = Calls(tmp_path / "harm")
    torch.save(content, file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file)
    assert torch.equal(ZeroCheckpoint(tmp_path).read("0.weight"), values["weight"]["0.weight"])
    assert not (tmp_path / "harm").exists()


class Script(nn.Module):
    """As TorchScript it writes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, value: int) -> int:
        return value

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.path)


@pytest.mark.filterwarnings("ignore:.torch.(jit|load).*")
def test_torchscript_under_the_name_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    script = torch.jit.script(Script(str(tmp_path / "harm")))
    torch.jit.save(script, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="it is a TorchScript archive"):
        ZeroCheckpoint(tmp_path)
    assert not (tmp_path / "harm").exists()


def go_on(directory: Path, with_moments: bool) -> list[float]:
    """This rank's losses of the steps after the checkpoint."""
    model = write_with_deepspeed.make_model()
    fully_shard(model[2])
    fully_shard(model)
    optimizer = torch.optim.AdamW(write_with_deepspeed.groups_of(model), lr=write_with_deepspeed.LR)

    def update(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert load_deepspeed(model, optimizer if with_moments else None, directory) == 3
    return write_with_deepspeed.train(range(3, 6), model, update)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_goes_on_from_what_deepspeed_itself_wrote(stage: int, tmp_path: Path) -> None:
    """Its own tool reads the same weights, and the losses of its next steps follow from the moments."""
    pytest.importorskip("deepspeed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", write_with_deepspeed.__file__]
    done = subprocess.run(
        [sys.executable, *launch, str(stage), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    check_against_deepspeed(tmp_path)


def check_against_deepspeed(directory: Path) -> None:
    checkpoint = ZeroCheckpoint(directory)
    expected = torch.load(directory / "fp32.pt")
    assert set(checkpoint.names) == set(expected) and checkpoint.step == 3 == checkpoint.global_steps
    assert all(torch.equal(checkpoint.read(name), value) for name, value in expected.items())
    losses = [json.loads((directory / f"losses{rank}.json").read_text()) for rank in range(2)]
    for found, followed in zip(run_ranks(go_on, directory, True), losses, strict=True):
        assert found == pytest.approx(followed, rel=1e-5)
    assert run_ranks(go_on, directory, False)[0][2] != pytest.approx(losses[0][2], rel=1e-3)
