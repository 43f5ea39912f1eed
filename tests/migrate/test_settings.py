"""Configurations of DeepSpeed and Accelerate: every key is mapped or ignored with a reason, or there is one error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from launch.migrate import RESHARDS, as_run, main, read_settings
from yafsdp_like.migrate.accelerate import read_accelerate
from yafsdp_like.migrate.deepspeed import read_deepspeed
from yafsdp_like.migrate.settings import load_mapping

DEEPSPEED: dict[str, Any] = {
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": "auto",
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.9, 0.95], "eps": "1e-8", "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 50, "warmup_num_steps": 5, "cos_min_ratio": 0.1, "warmup_type": "linear"},
    },
    "gradient_clipping": 1.0,
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_print": 20,
    "wall_clock_breakdown": False,
}
ACCELERATE: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "bf16",
    "num_machines": 2,
    "num_processes": 16,
    "machine_rank": 1,
    "main_process_ip": "10.0.0.1",
    "main_process_port": 29500,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": False,
        "fsdp_offload_params": True,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer, Embedding",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_activation_checkpointing": True,
        "fsdp_cpu_ram_efficient_loading": False,
    },
}


def changed(base: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A copy with dotted keys (`__` for the dot) set."""
    copy = json.loads(json.dumps(base))
    for key, value in keys.items():
        *sections, leaf = key.split("__")
        place = copy
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return copy


def test_a_deepspeed_file_becomes_options_and_a_run() -> None:
    settings = read_deepspeed(DEEPSPEED, world_size=8)
    options = settings.fully_shard_options()
    assert options == {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
        "reshard_after_forward": True,
    }
    assert settings.adamw == {
        "lr": 2e-4,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "max_norm": 1.0,
        "offload_moments": True,
    }
    assert settings.num_accumulated == 2
    assert settings.run == {
        "optimizer.offload_moments": True,
        "checkpoint.export": True,
        "checkpoint.export_dtype": "bfloat16",
        "precision.param_dtype": "bfloat16",
        "precision.reduce_dtype": "bfloat16",
        "global_batch_size": 64,
        "micro_batch_size": 4,
        "optimizer.lr": 2e-4,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.1,
        "optimizer.betas": [0.9, 0.95],
        "optimizer.max_grad_norm": 1.0,
        "optimizer.final_lr_ratio": 0.1,
        "optimizer.num_warmup_steps": 5,
        "num_steps": 50,
        "log.every": 20,
    }


def test_every_key_is_listed_once_in_its_order_with_what_it_became() -> None:
    keys = {key.name: key for key in read_deepspeed(DEEPSPEED, 8).keys}
    assert list(keys)[:4] == ["bf16.enabled", "fp16.enabled", "fp16.loss_scale", "zero_optimization.stage"]
    assert all(key.becomes or key.note for key in keys.values())
    assert keys["optimizer.params.lr"].becomes == "optimizer.lr"
    assert not keys["zero_optimization.overlap_comm"].becomes
    assert "no size to tune" in keys["zero_optimization.stage3_prefetch_bucket_size"].note
    table = str(read_deepspeed(DEEPSPEED, 8)).splitlines()
    assert table[0] == f"configuration: {len(keys)} keys" and len(table) == len(keys) + 1


@pytest.mark.parametrize(
    ("stage", "offload", "reshards", "on_host"),
    [
        (0, None, False, False),
        (1, None, False, False),
        (2, None, False, False),
        (3, None, True, False),
        (3, "cpu", True, True),
    ],
)
def test_stages_say_when_parameters_are_released_and_where_they_are(
    stage: int, offload: str | None, reshards: bool, on_host: bool
) -> None:
    zero = {"stage": stage} | ({"offload_param": {"device": offload, "pin_memory": False}} if offload else {})
    options = read_deepspeed({"zero_optimization": zero}).fully_shard_options()
    assert options["reshard_after_forward"] is reshards
    assert options.get("offload_policy") == (CPUOffloadPolicy(pin_memory=False) if on_host else None)


def test_a_secondary_partition_of_a_node_is_a_number_of_ranks_that_keep_parameters() -> None:
    settings = read_deepspeed({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}})
    assert settings.reshard_after_forward == 8


def test_what_a_file_does_not_say_of_the_optimizer_is_as_deepspeed_has_it() -> None:
    """Prevents: decay, betas, warm-up and cosine of this package's defaults in a run that had none of them."""
    settings = read_deepspeed({"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}})
    assert settings.adamw == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    rate = {key: settings.run[f"optimizer.{key}"] for key in ("betas", "num_warmup_steps", "final_lr_ratio")}
    assert rate == {"betas": [0.9, 0.999], "num_warmup_steps": 0, "final_lr_ratio": 1.0}
    by_torch = read_deepspeed({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}})
    assert by_torch.adamw["weight_decay"] == 0.01


def test_what_is_left_open_of_the_optimizer_gets_no_default() -> None:
    settings = read_deepspeed({"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}})
    assert settings.adamw == {"betas": (0.9, 0.999), "eps": 1e-8}
    assert "optimizer.num_warmup_steps" not in settings.run and not read_deepspeed({}).adamw


@pytest.mark.parametrize(("kind", "lr"), [("WarmupLR", 2e-4), ("WarmupDecayLR", 1e-3), ("WarmupCosineLR", 2e-4)])
def test_what_a_file_does_not_say_of_the_schedule_is_as_deepspeed_has_it(kind: str, lr: float) -> None:
    scheduler = {"type": kind, "params": {"total_num_steps": 5000}}
    settings = read_deepspeed({"optimizer": {"type": "Adam", "params": {"lr": lr}}, "scheduler": scheduler})
    assert (settings.run["optimizer.num_warmup_steps"], settings.run["optimizer.lr"]) == (1000, lr)
    scheduler["params"] = {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}
    assert "optimizer.num_warmup_steps" not in read_deepspeed({"scheduler": scheduler}).run


def test_adam_with_coupled_decay_is_refused_and_without_decay_is_the_same() -> None:
    params: dict[str, Any] = {"adam_w_mode": False, "betas": [0, "0.99"]}
    adam = read_deepspeed({"optimizer": {"type": "Adam", "params": params}}).adamw
    assert (adam["weight_decay"], adam["betas"]) == (0.0, (0.0, 0.99))
    params["weight_decay"] = 0.1
    decoupled = read_deepspeed({"optimizer": {"type": "AdamW", "params": params}})
    assert decoupled.adamw["weight_decay"] == 0.1
    assert {key.name: key.note for key in decoupled.keys}["optimizer.params.weight_decay"].endswith("matrices only")
    with pytest.raises(ValueError, match="make it yourself"):
        read_deepspeed({"optimizer": {"type": "Adam", "params": params}})


@pytest.mark.parametrize(
    ("keys", "micro", "accumulated"),
    [
        ({"gradient_accumulation_steps": 2}, 4, 2),
        ({"train_micro_batch_size_per_gpu": 2}, 2, 4),
        ({"train_micro_batch_size_per_gpu": "4", "gradient_accumulation_steps": 2.0}, 4, 2),
        ({}, None, 1),
    ],
)
def test_batch_sizes_that_are_not_said_follow_from_the_others(
    keys: dict[str, Any], micro: int | None, accumulated: int
) -> None:
    settings = read_deepspeed({"train_batch_size": 64, **keys}, world_size=8)
    assert (settings.run.get("micro_batch_size"), settings.num_accumulated) == (micro, accumulated)


def test_what_is_left_open_is_not_decided_here() -> None:
    """Prevents: a run in fp32 without clipping, because the file left both to Hugging Face's arguments."""
    settings = read_deepspeed({"bf16": {"enabled": "auto"}, "gradient_clipping": "auto", "zero_optimization": {}})
    assert not {"precision.param_dtype", "optimizer.max_grad_norm"} & set(settings.run)
    assert [key.note for key in settings.keys if key.value == "auto"] == [
        "it is left open: whoever starts the run says it"
    ] * 2
    assert read_deepspeed({}).run["precision.param_dtype"] == "float32"


def test_float16_comes_with_the_arguments_of_a_scaler() -> None:
    settings = read_deepspeed({"fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 50}})
    assert (settings.param_dtype, settings.grad_scaler) == ("float16", {"init_scale": 4096.0, "growth_interval": 50})
    fixed = read_deepspeed({"fp16": {"enabled": True, "loss_scale": 128}})
    assert fixed.grad_scaler is not None and fixed.grad_scaler["init_scale"] == 128.0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"zero_optimization__stagee": 3}, "unknown key 'zero_optimization.stagee'"),
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'"),
        ({"fp16__enabled": True}, "exclude each other"),
        ({"train_batch_size": 63}, "train_batch_size=63 is not"),
        ({"zero_optimization__offload_param": {"device": "cpu"}, "zero_optimization__stage": 2}, "is of stage 3"),
        ({"zero_optimization__offload_optimizer__device": "nvme"}, "'nvme' is not supported"),
        ({"zero_optimization__stage": 4}, "must be 0, 1, 2 or 3"),
        ({"optimizer__type": "Lamb"}, "'Lamb' is not supported"),
        ({"optimizer__params__lr": "fast"}, "must be a number of"),
        ({"bf16__enabled": "yes"}, "must be true or false"),
        ({"scheduler__type": "OneCycle"}, "'OneCycle' is not supported"),
        ({"scheduler__params__warmup_max_lr": 1.0}, "contradicts optimizer.params.lr"),
        ({"scheduler__type": "WarmupDecayLR"}, "(0.001 unless said) contradicts optimizer.params.lr=0.0002"),
        ({"optimizer__params__betas": 0.9}, "betas must be two numbers"),
        ({"train_micro_batch_size_per_gpu": 0}, "are at least 1"),
        ({"train_batch_size": 68, "train_micro_batch_size_per_gpu": None}, "train_batch_size=68 is not"),
        (
            {"train_batch_size": 8, "train_micro_batch_size_per_gpu": None},
            "gradient_accumulation_steps=2 x ranks=8 = 16",
        ),
        ({"train_batch_size": 64.5}, "train_batch_size must be a whole number, found 64.5"),
        ({"gradient_accumulation_steps": 2.5}, "gradient_accumulation_steps must be a whole number"),
        ({"train_batch_size": "nan"}, "train_batch_size must be a number of at least 0, found 'nan'"),
        ({"optimizer__params__lr": "-1"}, "lr must be a number of at least 0"),
        ({"gradient_clipping": -1.0}, "must be a number of at least 0"),
        ({"amp__enabled": True, "amp__opt_level": "O1"}, "Apex is not supported"),
        ({"zero_optimization__zero_quantized_weights": True}, "values travel as they are"),
        ({"zero_optimization__zeropp_loco_param": {"err_beta": 0.8}}, "gradients travel in reduce_dtype"),
        ({"zero_optimization__mics_shard_size": 4}, "pass fully_shard a mesh of (replicas, 4 ranks)"),
        ({"sparse_gradients": 1}, "gradients are dense"),
        ({"compression_training__head_pruning__shared_parameters__enabled": True}, "not supported"),
    ],
)
def test_what_contradicts_or_is_unknown_in_a_deepspeed_file_is_one_error(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="configuration: ") as raised:
        read_deepspeed(changed(DEEPSPEED, **keys), world_size=8)
    assert words in str(raised.value)


def test_what_is_refused_may_stand_in_a_file_that_switches_it_off() -> None:
    off = {"enabled": False, "schedule_offset": 50}
    zero = {"mics_shard_size": -1, "zeropp_loco_param": None, "stage3_partition_stream_chunk_size": 0}
    settings = read_deepspeed(
        {
            "zero_optimization": zero,
            "compression_training": {"head_pruning": {"shared_parameters": off}, "layer_reduction": {"enabled": False}},
            "data_efficiency": {"enabled": False, "data_sampling": {"enabled": True}},
            "sparse_gradients": False,
        }
    )
    assert [key.note for key in settings.keys[3:]] == ["it is off"] * 6


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"stage must be .*unknown key 'a'.*unknown key 'b'"):
        read_deepspeed({"a": 1, "b": {}, "zero_optimization": {"stage": 7}})


def test_an_accelerate_file_becomes_options_and_a_launch() -> None:
    settings = read_accelerate(ACCELERATE)
    assert settings.fully_shard_options() == {
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16),
        "reshard_after_forward": False,
        "offload_policy": CPUOffloadPolicy(),
    }
    assert settings.wrapped == ("LlamaDecoderLayer", "Embedding")
    assert settings.run["model.checkpoint_activations"] is True
    assert " ".join(settings.torchrun) == (
        "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500"
    )
    assert all(key.becomes or key.note for key in settings.keys)


@pytest.mark.parametrize(
    ("strategy", "reshards", "mesh"),
    [
        ("FULL_SHARD", True, None),
        (2, False, None),
        ("HYBRID_SHARD", True, (2, 8)),
        ("HYBRID_SHARD_ZERO2", False, (2, 8)),
    ],
)
def test_strategies_of_fsdp_1_say_what_is_released_and_the_mesh(
    strategy: str | int, reshards: bool, mesh: tuple[int, int] | None
) -> None:
    config = {**ACCELERATE, "fsdp_config": {"fsdp_version": 1, "fsdp_sharding_strategy": strategy}}
    settings = read_accelerate(config)
    assert (settings.reshard_after_forward, settings.mesh_shape) == (reshards, mesh)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"fsdp_config__fsdp_sharding_strategy": "FULL_SHARD"}, "is of fsdp_version 1"),
        ({"fsdp_config__fsdp_reshard_after_forward": "FULL_SHARD"}, "must be true or false in fsdp_version 2"),
        ({"fsdp_config__fsdp_version": 3}, "must be 1 or 2"),
        ({"fsdp_config__fsdp_autowrap_policy": "NO_WRAP"}, "did you mean 'fsdp_config.fsdp_auto_wrap_policy'"),
        ({"num_processes": 15}, "does not divide by num_machines=2"),
        ({"num_machines": "two", "fsdp_config__fsdp_version": 1}, "num_machines must be a number"),
        ({"distributed_type": "MULTI_GPU"}, "must be FSDP"),
        ({"mixed_precision": "fp8"}, "must be no, fp16 or bf16"),
        ({"parallelism_config__parallelism_config_tp_size": 2}, "only data parallel meshes"),
        ({"parallelism_config__parallelism_config_dp_replicate_size": 3}, "are not num_processes=16"),
    ],
)
def test_what_contradicts_or_is_unknown_in_an_accelerate_file_is_one_error(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="configuration: ") as raised:
        read_accelerate(changed(ACCELERATE, **keys))
    assert words in str(raised.value)


@pytest.mark.parametrize(("name", "kind"), [("a.json", "JSON"), ("a.yml", "YAML"), ("README.md", "YAML")])
def test_a_file_of_another_kind_is_one_line(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a: b: [")
    with pytest.raises(ValueError, match=rf"{name} is not {kind}: [^\n]+$"):
        load_mapping(tmp_path / name)


def test_an_accelerate_file_that_names_a_deepspeed_file_is_read_with_it(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    config: dict[str, Any] = {"distributed_type": "DEEPSPEED", "num_processes": 8, "mixed_precision": "fp16"}
    config["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "ds.json"), "zero_stage": 3}
    settings = read_accelerate(config)
    assert settings.num_accumulated == 2
    assert settings.torchrun == ("--nproc-per-node", "8")
    assert [key.name for key in settings.keys[:5]] == [
        *("distributed_type", "num_processes", "mixed_precision"),
        "deepspeed_config.deepspeed_config_file",
        "deepspeed_config.zero_stage",
    ]
    assert settings.keys[5:] == read_deepspeed(tmp_path / "ds.json", 8).keys
    assert settings.param_dtype == "bfloat16" and settings.keys[2].note == "the DeepSpeed file says it"
    with pytest.raises(ValueError, match="unknown key 'nonsense'"):
        read_accelerate({**config, "nonsense": 1})
    (tmp_path / "ds.json").write_text('{"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}')
    opened = read_accelerate(config)
    assert (opened.param_dtype, opened.output_dtype, opened.grad_scaler) == ("float16", None, {})
    assert opened.run["precision.param_dtype"] == "float16"


def test_the_command_prints_a_run_that_the_launcher_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.config import load

    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    assert main([str(tmp_path / "ds.json"), "--world-size", "8"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    config = load([str(tmp_path / "run.yaml")])
    assert config.optimizer.lr == 2e-4 and config.num_accumulated(8) == 2 and config.precision.param_dtype == "bfloat16"
    (tmp_path / "fp16.json").write_text('{"fp16": {"enabled": true}}')
    assert main([str(tmp_path / "fp16.json")]) == 1
    assert "precision.param_dtype" in capsys.readouterr().err
    (tmp_path / "acc.yaml").write_text(yaml.safe_dump(ACCELERATE))
    assert read_settings(tmp_path / "acc.yaml").torchrun[1] == "8"
    (tmp_path / "broken.json").write_text("{")
    assert main([str(tmp_path / "broken.json")]) == 1


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"offload_param": {"device": "cpu"}}, "parameters in host memory"),
        ({"zero_hpz_partition_size": 8}, "reshard_after_forward=8"),
    ],
)
def test_a_run_that_would_do_less_than_a_deepspeed_file_asks_is_an_error(zero: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"configuration asks for {words}.*, which launch.train does not do"):
        as_run(read_deepspeed({"zero_optimization": {"stage": 3, **zero}}))


def test_a_run_that_would_do_less_than_an_accelerate_file_asks_is_an_error() -> None:
    sharding = {"fsdp_version": 1, "fsdp_sharding_strategy": "HYBRID_SHARD", "fsdp_offload_params": True}
    with pytest.raises(ValueError, match=r"in host memory .* and a mesh of \(2, 8\)"):
        as_run(read_accelerate({**ACCELERATE, "fsdp_config": sharding}))


def test_a_run_says_that_it_reshards_where_a_file_does_not_ask_for_it() -> None:
    said = [RESHARDS in as_run(read_deepspeed({"zero_optimization": {"stage": stage}})) for stage in (2, 3)]
    assert said == [True, False]
