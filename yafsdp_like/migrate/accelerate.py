"""An Accelerate configuration (YAML) with FSDP of version 1 or 2, read into this package's options.

Owns what each key of Accelerate means here. Accelerate itself is not imported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from yafsdp_like.migrate.deepspeed import read_deepspeed
from yafsdp_like.migrate.settings import DTYPES, ForeignSettings, Keys, as_number, load_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FSDP, PARALLEL = "fsdp_config", "parallelism_config"
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")  # numbered from 1
POLICIES = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
PREFETCHES = "one unit is all-gathered ahead in any case"
IGNORED = {
    f"{FSDP}.fsdp_backward_prefetch": PREFETCHES,
    f"{FSDP}.fsdp_backward_prefetch_policy": PREFETCHES,
    f"{FSDP}.fsdp_forward_prefetch": PREFETCHES,
    f"{FSDP}.fsdp_limit_all_gathers": "slots of planned memory limit them",
    f"{FSDP}.fsdp_use_orig_params": "parameters are always the original ones",
    f"{FSDP}.fsdp_sync_module_states": "make the model on the meta device, or from one seed",
    f"{FSDP}.fsdp_cpu_ram_efficient_loading": "make the model on the meta device; load_hf_weights reads a rank's rows",
    f"{FSDP}.fsdp_state_dict_type": "get_model_state_dict gives either; checkpoints of launch.train are sharded",
    f"{FSDP}.fsdp_activation_checkpointing_offload": "model.offload_activations offloads what blocks save",
    "compute_environment": "torchrun starts the ranks",
    "debug": "YAFSDP_DEBUG=1 checks what ranks do together, and accesses to memory",
    "downcast_bf16": "it is for TPUs",
    "enable_cpu_affinity": "launch.doctor says whether ranks share cores",
    "main_training_function": "it is for TPUs",
    "rdzv_backend": "torchrun --rdzv-backend",
    "same_network": "it is Accelerate's question",
    "gpu_ids": "set CUDA_VISIBLE_DEVICES",
    "use_cpu": "a GPU is used where there is one for each rank; launch.train has --device",
    **dict.fromkeys(
        ("tpu_name", "tpu_zone", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "commands"),
        "it is for other machines",
    ),
    "command_file": "it is for other machines",
    "mpirun_config.": "torchrun starts the ranks",
    "dynamo_config.": "compile blocks by torch.compile, or model.compile",
    "deepspeed_config.deepspeed_multinode_launcher": "torchrun starts the ranks",
    "deepspeed_config.zero3_init_flag": "make the model on the meta device",
}
REFUSED = {
    "fp8_config.": "use torchao's float8 modules, whose tensors are all-gathered in a byte a value",
    "megatron_lm_config.": "not supported",
}


def read_accelerate(config: str | Path | Mapping[str, Any]) -> ForeignSettings:
    """Read an Accelerate configuration into this package's options, and say of each key what became of it.

    Args:
        config: a YAML file as ``accelerate config`` writes it, or its content. One that names a DeepSpeed file is read
            with it.

    Raises:
        ValueError: with every unknown key, contradiction, and setting that would change numbers and is not supported.
    """
    source, values = load_mapping(config)
    keys = Keys(source, values)
    torchrun, world_size = _ranks(keys)
    kind = keys.take("distributed_type", "fully_shard")
    if kind == "DEEPSPEED" and (file := keys.get("deepspeed_config.deepspeed_config_file")):
        return _with_deepspeed(keys, read_deepspeed(file, world_size), torchrun)
    if kind != "FSDP":
        keys.problem(f"distributed_type must be FSDP, or DEEPSPEED with a deepspeed_config_file, found {kind!r}")
    run: dict[str, Any] = {}
    found = _precision(keys, run) | _sharding(keys, run, world_size)
    keys.ignore(IGNORED)
    keys.refuse(REFUSED)
    return ForeignSettings(source, keys.finish([*IGNORED, *REFUSED]), run=run, torchrun=torchrun, **found)


def _with_deepspeed(keys: Keys, found: ForeignSettings, torchrun: tuple[str, ...]) -> ForeignSettings:
    """Return what the DeepSpeed file says, with Accelerate's precision where it says none, and the keys of both."""
    run: dict[str, Any] = {}
    precision: dict[str, Any] = {}
    if "precision.param_dtype" not in found.run:
        precision = _precision(keys, run)
        precision.pop("output_dtype", None)  # DeepSpeed leaves it as computed
    keys.ignore({"mixed_precision": "the DeepSpeed file says it"})
    keys.ignore({**IGNORED, "deepspeed_config.": "the DeepSpeed file says it", f"{FSDP}.": "it is of FSDP"})
    keys.refuse(REFUSED)
    return replace(
        found,
        keys=(*keys.finish([*IGNORED, *REFUSED]), *found.keys),
        run={**found.run, **run},
        torchrun=torchrun,
        **precision,
    )


def _ranks(keys: Keys) -> tuple[tuple[str, ...], int]:
    total = keys.integer("num_processes", "torchrun --nproc-per-node (times --nnodes)", default=1)
    hosts = keys.integer("num_machines", "torchrun --nnodes", default=1)
    if hosts < 1 or total % hosts:
        keys.problem(f"num_processes={total} does not divide by num_machines={hosts}")
        hosts = 1
    words = ["--nproc-per-node", str(total // hosts)]
    if hosts > 1:
        words += ["--nnodes", str(hosts)]
    for name, option in (
        ("machine_rank", "--node-rank"),
        ("main_process_ip", "--master-addr"),
        ("main_process_port", "--master-port"),
    ):
        value = keys.take(name, f"torchrun {option}")
        words += [option, str(value)] if value is not None and hosts > 1 else []
    return tuple(words), total


def _precision(keys: Keys, run: dict[str, Any]) -> dict[str, Any]:
    given = str(
        keys.take("mixed_precision", "MixedPrecisionPolicy(param_dtype, reduce_dtype, output_dtype)", default="no")
    )
    if given in ("no", "False"):
        run["precision.param_dtype"] = "float32"
        return {}
    if given not in DTYPES:
        keys.problem(f"mixed_precision must be no, fp16 or bf16, found {given!r}")
        return {}
    dtype = DTYPES[given]
    run |= {"precision.param_dtype": dtype, "precision.reduce_dtype": dtype}
    found: dict[str, Any] = {"param_dtype": dtype, "reduce_dtype": dtype, "output_dtype": dtype}
    return found | ({"grad_scaler": {}} if dtype == "float16" else {})


def _sharding(keys: Keys, run: dict[str, Any], world_size: int) -> dict[str, Any]:
    version = keys.number(f"{FSDP}.fsdp_version", "fully_shard, which is version 2", default=1)
    if version not in (1, 2):
        keys.problem(f"{FSDP}.fsdp_version must be 1 or 2, found {version}")
    found = _reshard(keys, version, world_size)
    found |= _mesh(keys, world_size)
    if keys.flag(f"{FSDP}.fsdp_offload_params", "fully_shard(offload_policy=CPUOffloadPolicy())"):
        found["cpu_offload"] = True
    policy = str(
        keys.take(f"{FSDP}.fsdp_auto_wrap_policy", "the modules that fully_shard is called for", default=POLICIES[2])
    )
    if policy.upper() not in POLICIES:
        keys.problem(f"{FSDP}.fsdp_auto_wrap_policy must be one of {', '.join(POLICIES)}, found {policy!r}")
    classes = keys.take(f"{FSDP}.fsdp_transformer_layer_cls_to_wrap", "the blocks that fully_shard is called for")
    names = classes if isinstance(classes, list) else str(classes).split(",") if classes else []
    keys.number(f"{FSDP}.fsdp_min_num_params", "the modules that fully_shard is called for")
    if classes and policy.upper() == POLICIES[1]:
        keys.problem(f"{FSDP}.fsdp_transformer_layer_cls_to_wrap is of {POLICIES[0]}, and the policy is {policy}")
    keys.take(
        f"{FSDP}.fsdp_ignored_modules", "fully_shard(ignored_params=...)", "a pattern of names: pass their parameters"
    )
    if keys.flag(f"{FSDP}.fsdp_activation_checkpointing", "model.checkpoint_activations, or checkpoint_wrapper"):
        run["model.checkpoint_activations"] = True
    return found | {"wrapped": tuple(str(name).strip() for name in names)}


def _reshard(keys: Keys, version: float, world_size: int) -> dict[str, Any]:
    """Return what the strategy of version 1, or the flag of version 2, means."""
    becomes = "fully_shard(reshard_after_forward=...)"
    strategy = keys.take(f"{FSDP}.fsdp_sharding_strategy", becomes)
    given = keys.take(f"{FSDP}.fsdp_reshard_after_forward", becomes)
    if version == 2:
        if strategy is not None:
            keys.problem(f"{FSDP}.fsdp_sharding_strategy is of fsdp_version 1: say fsdp_reshard_after_forward")
        if given is not None and str(given).lower() not in ("true", "false"):
            keys.problem(f"{FSDP}.fsdp_reshard_after_forward must be true or false in fsdp_version 2, found {given!r}")
        return {"reshard_after_forward": str(given).lower() != "false"}
    if strategy is not None and given is not None and strategy != given:
        keys.problem(f"{FSDP}.fsdp_sharding_strategy={strategy!r} contradicts fsdp_reshard_after_forward={given!r}")
    name = str(strategy if strategy is not None else given if given is not None else STRATEGIES[0]).upper()
    name = STRATEGIES[int(name) - 1] if name.isdigit() and 0 < int(name) <= len(STRATEGIES) else name
    if name not in STRATEGIES:
        keys.problem(f"{FSDP}.fsdp_sharding_strategy must be one of {', '.join(STRATEGIES)}, found {name!r}")
    if name == "NO_SHARD":
        keys.problem(f"{FSDP}.fsdp_sharding_strategy NO_SHARD is DistributedDataParallel: nothing would be sharded")
    found: dict[str, Any] = {"reshard_after_forward": name in ("FULL_SHARD", "HYBRID_SHARD")}
    hosts = int(as_number(keys.get("num_machines")) or 1)
    if name.startswith("HYBRID") and hosts > 1:
        found["mesh_shape"] = (hosts, world_size // hosts)
    return found


def _mesh(keys: Keys, world_size: int) -> dict[str, Any]:
    sizes = {
        name: keys.integer(f"{PARALLEL}.{PARALLEL}_{name}_size", becomes, default=1)
        for name, becomes in (
            ("dp_replicate", "fully_shard(mesh=<replicas x ranks>)"),
            ("dp_shard", "fully_shard(mesh=...)"),
            ("tp", "torch's parallelize_module before fully_shard"),
            ("cp", "context parallelism"),
            ("sp", "sequence parallelism"),
        )
    }
    keys.ignore(
        {
            f"{PARALLEL}.{PARALLEL}_{name}": "there is no such parallelism here"
            for name in (
                "cp_backend",
                "cp_comm_strategy",
                "sp_backend",
                "sp_seq_length",
                "sp_seq_length_is_variable",
                "sp_attn_implementation",
            )
        }
    )
    for name in ("tp", "cp", "sp"):
        if sizes[name] > 1:
            keys.problem(f"{PARALLEL}_{name}_size={sizes[name]}: only data parallel meshes can be read from a file")
    replicas, shards = sizes["dp_replicate"], sizes["dp_shard"]
    if replicas == 1:
        return {}
    if replicas * shards != world_size:
        keys.problem(f"{PARALLEL}: {replicas} replicas of {shards} ranks are not num_processes={world_size}")
    return {"mesh_shape": (replicas, shards)}
