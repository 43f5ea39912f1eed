"""Where weights come from: directories, checkpoints, presets, and what is refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from tests.inference.weights.test_weights import (
    CONFIG,
    CONFIGS,
    CPU,
    LIMITS,
    decoder,
    differences,
    group,
)
from tests.ranks import run_ranks
from tests.training import world_mesh
from yafsdp_like import fully_shard
from yafsdp_like.checkpoint.steps import StepCheckpoints
from yafsdp_like.comm.choice import transport_of
from yafsdp_like.inference.plan.packed_weights import Parameter, pack_units
from yafsdp_like.inference.plan.serving_plan import plan_serving
from yafsdp_like.inference.weights import loading
from yafsdp_like.inference.weights.loading import RandomSource, _fill_part, load, open_model, site_of
from yafsdp_like.models import PRESETS, Decoder
from yafsdp_like.models.hf import save_hf
from yafsdp_like.models.moe import ExpertsConfig
from yafsdp_like.models.tensor_parallel import Cut


@pytest.fixture(scope="module", params=["grouped-query", "multi-query, biases", "tied"])
def hf_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    module = decoder(CONFIGS[request.param])
    directory = tmp_path_factory.mktemp("model")
    save_hf(module, directory, max_file_nbytes=60_000)
    return module, directory


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_a_hugging_face_directory_is_loaded(hf_directory: Any, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, directory = hf_directory
    monkeypatch.setattr("yafsdp_like.inference.weights.loading._READ_NBYTES", 1000)  # some rows at a time
    model = open_model(str(directory))
    assert (model.config, model.directory) == (module.config, directory)
    assert differences(load(model, LIMITS, mode=mode), module) == []


class Counting:
    """0, 1, 2, ... for every parameter, and how many elements were asked for at a time."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        self.asked.append(len(out))
        out.copy_(torch.arange(start, start + len(out)))


@pytest.mark.parametrize("dim", [1, 2])
def test_a_rank_reads_its_part_of_experts_with_room_for_the_matrix_of_one(dim: int) -> None:
    """Prevents: three stacks of all experts of a layer beside an arena that has taken what is free."""
    num_experts, cut = 4, Cut(dim, 2)
    whole = torch.arange(num_experts * 6 * 8, dtype=torch.float32).view(num_experts, 6, 8)
    part = Parameter("experts", cut.part(whole.shape), torch.float32, cut)
    source = Counting()
    for rank in range(2):
        values = torch.empty(part.numel)
        _fill_part(values, 0, part, rank, source)
        assert torch.equal(values.view(part.shape), whole.chunk(2, dim)[rank])
    assert source.asked == [6 * 8] * num_experts * 2


def test_random_experts_that_are_read_one_by_one_are_drawn_once() -> None:
    name, config = "layers.0.mlp.experts.up_proj", replace(CONFIG, experts=ExpertsConfig(4, 2))
    source, found, whole = (
        RandomSource(config, CPU),
        torch.empty(4, CONFIG.ffn_dim, CONFIG.dim),
        torch.empty(4, CONFIG.ffn_dim, CONFIG.dim),
    )
    with patch.object(loading, "fill_first_values", wraps=loading.fill_first_values) as drawn:
        for index, matrix in enumerate(found):
            source.read_into(name, index * matrix.numel(), matrix.view(-1))
    assert drawn.call_count == 1
    source.read_into(name, 0, whole.view(-1))
    assert torch.equal(found, whole)


def gather_from_files(directory: Path) -> list[str]:
    transport = transport_of(group(), CPU, "process_group")
    weights = load(str(directory), LIMITS, mode="gathered", transport=transport)
    return differences(weights, decoder(weights.config))


def test_ranks_read_their_own_parts_of_a_directory(hf_directory: Any) -> None:
    _, directory = hf_directory
    assert run_ranks(gather_from_files, directory) == [[], []]


def save_checkpoint(directory: Path, metadata: dict[str, Any]) -> None:
    """As training does: sharded, in the layout of ``step-N`` directories."""
    module: Any = decoder()
    for layer in module.layers:
        fully_shard(layer, mesh=world_mesh())
    fully_shard(module, mesh=world_mesh())
    checkpoints = StepCheckpoints(directory, keep=2, asynchronous=False)
    checkpoints.save(3, {"model": get_model_state_dict(module)}, metadata)
    checkpoints.close()


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    shapes = {name: list(parameter.shape) for name, parameter in decoder().named_parameters()}
    run_ranks(save_checkpoint, directory, {"step": 3, "shapes": shapes})
    return directory


def test_a_checkpoint_of_training_is_loaded_by_its_name_or_its_runs(run_directory: Path) -> None:
    for name in (run_directory, run_directory / "step-3"):
        model = open_model(str(name), CONFIG)
        assert differences(load(model, LIMITS), decoder()) == []
        assert differences(load(model, LIMITS, mode="streamed", dtype=torch.bfloat16), decoder()) == []


def test_a_checkpoint_says_its_configuration_where_training_exported_it(run_directory: Path) -> None:
    with pytest.raises(ValueError, match="does not say what model it is of"):
        open_model(str(run_directory))
    exported = run_directory / "step-3" / "hf"
    save_hf(decoder(), exported)
    model = open_model(str(run_directory))
    assert (model.config, model.directory) == (open_model(str(exported)).config, exported)
    assert differences(load(model, LIMITS), decoder()) == []


def test_a_checkpoint_of_another_model_is_refused(run_directory: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint of another model: layers\.0\.mlp\.gate_proj\.weight"):
        open_model(str(run_directory), replace(CONFIG, ffn_dim=44))


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_a_preset_starts_from_the_decoders_own_first_values(name: str) -> None:
    module = Decoder(PRESETS[name])
    assert differences(load(f"preset:{name}", LIMITS), module) == []


def test_any_part_of_a_random_parameter_is_the_same_as_in_the_whole() -> None:
    config = replace(PRESETS["tiny"], vocab_size=3000)  # of more rows than are drawn at once
    whole = dict(Decoder(config).named_parameters())
    source = RandomSource(config, CPU)
    for name, start, stop in (("embed_tokens.weight", 100_001, 150_007), ("layers.1.mlp.down_proj.weight", 5, 9000)):
        part = torch.empty(stop - start)
        source.read_into(name, start, part)
        assert torch.equal(part, whole[name].detach().flatten()[start:stop])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("preset:tinny", "did you mean 'tiny'"),
        ("preset:zzz", "unknown preset 'zzz'; "),
        ("/nowhere/at/all", r"expected a Hugging Face directory, a checkpoint \(step-N\) or preset:NAME"),
    ],
)
def test_what_is_no_model_is_refused(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        open_model(name)


def test_a_directory_of_nothing_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a Hugging Face directory, .*: it has no config\.json$"):
        open_model(str(tmp_path))


def test_a_directory_that_lacks_a_weight_is_refused_before_anything_is_read(hf_directory: Any, tmp_path: Path) -> None:
    _, directory = hf_directory
    raw = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 6, "layer_types": None}))
    for path in directory.glob("model*"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.5"):
        open_model(str(tmp_path))


def test_images_are_the_same_in_every_mode() -> None:
    """So that a host copy, a shard and what stays are cut from one layout."""
    packed_units = pack_units(CONFIG, torch.float32)
    for mode in ("resident", "streamed"):
        assert plan_serving(CONFIG, LIMITS, site_of(CPU), mode).placement.packed_units == packed_units
