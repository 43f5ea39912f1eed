"""A DeepSpeed configuration (JSON), read into this package's options.

Owns what each key of DeepSpeed means here. Keys follow DeepSpeed's documentation; DeepSpeed itself is not imported.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from yafsdp_like.migrate.settings import ForeignSettings, Keys, as_number, load_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PLANNED = "memory is planned from the model: there is no size to tune"
ALWAYS = "it is always so here"
OTHERS = "of another library's logging; see metrics.jsonl and log.tensorboard"
ZERO = "zero_optimization"
IGNORED = {
    **{
        f"{ZERO}.{name}": PLANNED
        for name in (
            *("allgather_bucket_size", "reduce_bucket_size", "prefetch_bucket_size", "stage3_prefetch_bucket_size"),
            *("sub_group_size", "max_live_parameters", "stage3_max_live_parameters", "max_reuse_distance"),
            *("stage3_max_reuse_distance", "param_persistence_threshold", "stage3_param_persistence_threshold"),
            *("model_persistence_threshold", "stage3_model_persistence_threshold", "memory_efficient_linear"),
            *("offload_param.buffer_count", "offload_param.buffer_size", "offload_param.max_in_cpu"),
            *("offload_optimizer.buffer_count", "offload_optimizer.pipeline_read", "offload_optimizer.pipeline_write"),
            *("offload_optimizer.fast_init", "offload_optimizer.pin_memory", "stage3_module_granularity_threshold"),
            *("module_granularity_threshold", "parameter_alignment"),
            *("partition_stream_chunk_size", "stage3_partition_stream_chunk_size"),
        )
    },
    **{
        f"{ZERO}.{name}": ALWAYS
        for name in (
            *("contiguous_gradients", "overlap_comm", "reduce_scatter", "allgather_partitions", "compute_grad_norm"),
            *("round_robin_gradients", "elastic_checkpoint", "load_from_fp32_weights", "ignore_unused_parameters"),
        )
    },
    **{
        f"{ZERO}.{name}": "it chooses between implementations of DeepSpeed"
        for name in (
            *("use_multi_rank_bucket_allreduce", "legacy_stage1", "override_module_apply", "allgather_sequential"),
            *("log_trace_cache_warnings", "enable_sanity_checks", "pipeline_loading_checkpoint"),
            *("stage3_allgather_sequential", "use_all_reduce_for_fetch_params", "leaf_module."),
            *("stage3_use_all_reduce_for_fetch_params", "save_muon_momentum_buffer_in_memory"),
            "mics_hierarchical_params_gather",
        )
    },
    **dict.fromkeys(("wandb.", "comet.", "csv_monitor.", "tensorboard.output_path", "tensorboard.job_name"), OTHERS),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), "metrics.jsonl has times and memory"),
    "flops_profiler.": "log.profile_step traces a step",
    "activation_checkpointing.": "it configures deepspeed.checkpointing, which a model calls itself; here: "
    "model.checkpoint_activations, or torch.utils.checkpoint in the model",
    "aio.": "for NVMe, which is not used here",
    "autotuning.": "launch.plan --fit finds what fits",
    "checkpoint.": "checkpoints are of torch's distributed format, for any number of ranks",
    "compile.": "compile blocks by torch.compile, or model.compile",
    "zero_allow_untested_optimizer": "any torch.optim optimizer may be used",
    "zero_force_ds_cpu_optimizer": "the optimizer is never changed for another",
    "disable_allgather": "it has no effect in DeepSpeed",
    "disable_python_gc": "it is Python's setting: gc.disable()",
    "dataloader_drop_last": "it is the data loader's",
    "communication_data_type_for_seq_parallel": "there is no sequence parallelism here",
    "seq_parallel_communication_data_type": "there is no sequence parallelism here",
    "log_level": "it is DeepSpeed's logger's",
    "comms_logger.": "YAFSDP_DEBUG=1 and launch.doctor look at communication",
    "bf16.immediate_grad_update": "gradients are reduced as soon as backward has them",
    "bf16.check_overflow": "bfloat16 has fp32's range; optimizer.nonfinite says what is done about values without one",
    **{
        f"fp16.{name}": "torch.amp.GradScaler has no such rule"
        for name in ("hysteresis", "consecutive_hysteresis", "min_loss_scale", "auto_cast")
    },
    **{
        f"optimizer.params.{name}": "AdamW with bias correction is what there is"
        for name in ("torch_adam", "adam_w_mode", "bias_correction", "fused", "foreach")
    },
}
REFUSED = {
    "amp.": "Apex is not supported; use bf16",
    "torch_autocast.": "param_dtype says what is computed in; use bf16",
    "sparse_gradients": "gradients are dense",
    "compression_training.": "not supported",
    "data_efficiency.": "not supported; it belongs to the data loader",
    "curriculum_learning.": "not supported; it belongs to the data loader",
    "elasticity.": "a checkpoint resumes on any number of ranks instead",
    "bf16.bf16_master_weights_and_grads": "master weights are fp32; fully_shard(split_master=True) takes 2 bytes less",
    "bf16.bf16_optimizer_states": "use AdamW(moments='bf16'), which rounds stochastically",
    "fp16.fp16_master_weights_and_grads": "master weights are fp32",
    f"{ZERO}.zenflow": "not supported",
    f"{ZERO}.zenflow.": "not supported",
    f"{ZERO}.zeropp_loco_param": "gradients travel in reduce_dtype",
    f"{ZERO}.zeropp_loco_param.": "gradients travel in reduce_dtype",
    f"{ZERO}.zero_quantized_weights": "values travel as they are, unless their tensor class says otherwise",
    f"{ZERO}.zero_quantized_nontrainable_weights": "values travel as they are",
    f"{ZERO}.zero_quantized_gradients": "gradients travel in reduce_dtype",
    f"{ZERO}.offload_optimizer.super_offload": "not supported",
    f"{ZERO}.cpu_offload": "a name of before 2021; use offload_optimizer",
    f"{ZERO}.cpu_offload_param": "a name of before 2021; use offload_param",
    f"{ZERO}.cpu_offload_use_pin_memory": "a name of before 2021; use offload_param.pin_memory",
    "optimizer.legacy_fusion": "not supported",
    "optimizer.params.amsgrad": "AdamW has no amsgrad here; torch.optim.AdamW has",
}
KNOWN = (  # beside those of both tables
    *("bf16.enabled", "fp16.enabled", f"{ZERO}.stage", "optimizer.type", "optimizer.params.lr", "scheduler.type"),
    *("scheduler.params.warmup_num_steps", "tensorboard.enabled", "data_types.grad_accum_dtype", "gradient_clipping"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print"),
)
# What DeepSpeed takes for what a file does not say; its fused Adam and that of the CPU take the same.
DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
WARMUP_STEPS, DECAY_LR = 1000, 1e-3
ADAMS = ("adam", "adamw", "fusedadam", "cpuadam", "deepspeedcpuadam")


def read_deepspeed(config: str | Path | Mapping[str, Any], world_size: int | None = None) -> ForeignSettings:
    """Read a DeepSpeed configuration into this package's options, and say of each key what became of it.

    Args:
        config: a JSON file, or its content. "auto" is a value that is left open, as Hugging Face writes it.
        world_size: ranks, to check batch sizes and to complete them.

    Raises:
        ValueError: with every unknown key, contradiction, and setting that would change numbers and is not supported.
    """
    source, values = load_mapping(config)
    keys = Keys(source, values)
    run: dict[str, Any] = {}
    found = _zero(keys, run) | _precision(keys, run)
    accumulated = _batches(keys, run, world_size)
    adamw = _optimizer(keys, run) | _clipping(keys, run)
    _scheduler(keys, run)
    _logging(keys, run)
    keys.ignore(IGNORED)
    keys.refuse(REFUSED)
    return ForeignSettings(
        source, keys.finish([*IGNORED, *REFUSED, *KNOWN]), num_accumulated=accumulated, adamw=adamw, run=run, **found
    )


def _zero(keys: Keys, run: dict[str, Any]) -> dict[str, Any]:
    stage = keys.number(f"{ZERO}.stage", "fully_shard(reshard_after_forward=...)", "see docs/migrate.md", default=0)
    if stage not in (0, 1, 2, 3):
        keys.problem(f"{ZERO}.stage must be 0, 1, 2 or 3, found {stage!r}")
    found: dict[str, Any] = {"reshard_after_forward": stage == 3}
    parameters = keys.take(f"{ZERO}.offload_param.device", "fully_shard(offload_policy=CPUOffloadPolicy())")
    moments = keys.take(f"{ZERO}.offload_optimizer.device", "AdamW(offload_moments=True)")
    for name, device in (("offload_param", parameters), ("offload_optimizer", moments)):
        if device not in (None, "none", "cpu"):
            keys.problem(f"{ZERO}.{name}.device {device!r} is not supported: use cpu")
    if parameters == "cpu" and stage != 3:
        keys.problem(f"{ZERO}.offload_param is of stage 3, and {ZERO}.stage is {stage}")
    if parameters == "cpu":
        found |= {"cpu_offload": True}
    elif moments == "cpu":
        run["optimizer.offload_moments"] = True
    ratio = keys.number(f"{ZERO}.offload_optimizer.ratio", "all moments are offloaded, or none", default=1)
    if ratio != 1:
        keys.problem(f"{ZERO}.offload_optimizer.ratio={ratio}: all moments are offloaded here, or none")
    for name in ("offload_param", "offload_optimizer"):
        keys.ignore(
            dict.fromkeys(
                (f"{ZERO}.{name}.nvme_path", f"{ZERO}.{name}.cpuadam_cores_perc", f"{ZERO}.{name}"),
                "without NVMe and a CPU optimizer there is nothing to set",
            )
        )
    found["pin_memory"] = keys.flag(
        f"{ZERO}.offload_param.pin_memory", "CPUOffloadPolicy(pin_memory=...)", default=True
    )
    node = keys.integer(
        f"{ZERO}.zero_hpz_partition_size", "reshard_after_forward=<ranks that keep parameters>", default=1
    )
    if node > 1:
        if stage != 3:
            keys.problem(f"{ZERO}.zero_hpz_partition_size is of stage 3, and {ZERO}.stage is {stage}")
        found["reshard_after_forward"] = node
    mics = keys.take(f"{ZERO}.mics_shard_size", "fully_shard(mesh=...)", default=-1)
    if mics != -1:
        keys.problem(
            f"{ZERO}.mics_shard_size={mics}: pass fully_shard a mesh of (replicas, {mics} ranks), and leave it out"
        )
    for name in (
        "stage3_gather_16bit_weights_on_model_save",
        "gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
    ):
        if keys.flag(f"{ZERO}.{name}", "checkpoint.export, checkpoint.export_dtype"):
            run |= {"checkpoint.export": True, "checkpoint.export_dtype": "bfloat16"}
    return found


def _precision(keys: Keys, run: dict[str, Any]) -> dict[str, Any]:
    section = "bfloat16" if keys.get("bfloat16.enabled") is not None else "bf16"
    bf16 = keys.flag(f"{section}.enabled", "MixedPrecisionPolicy(param_dtype=torch.bfloat16)")
    fp16 = keys.flag("fp16.enabled", "MixedPrecisionPolicy(param_dtype=torch.float16), with GradScaler")
    if bf16 and fp16:
        keys.problem("bf16.enabled and fp16.enabled exclude each other")
    param = "bfloat16" if bf16 else "float16" if fp16 else None
    reduce = keys.dtype("communication_data_type", "MixedPrecisionPolicy(reduce_dtype=...)") or param
    kept = keys.dtype("data_types.grad_accum_dtype", "fully_shard(grad_dtype=...)")
    if kept not in (None, "float32"):
        keys.problem(
            f"data_types.grad_accum_dtype {kept}: gradients are kept in fp32 unless fully_shard gets grad_dtype"
        )
    if not (keys.is_open(f"{section}.enabled") or keys.is_open("fp16.enabled")):
        run |= {"precision.param_dtype": param or "float32", "precision.reduce_dtype": reduce or "float32"}
    scaler = _scaler(keys) if fp16 else None
    if not fp16:
        keys.ignore(
            dict.fromkeys(("fp16.loss_scale", "fp16.initial_scale_power", "fp16.loss_scale_window"), "fp16 is off")
        )
    return {"param_dtype": param, "reduce_dtype": reduce, "grad_scaler": scaler}


def _scaler(keys: Keys) -> dict[str, Any]:
    fixed = keys.number("fp16.loss_scale", "GradScaler(init_scale=...); 0: dynamic", default=0)
    power = keys.integer("fp16.initial_scale_power", "GradScaler(init_scale=2**...)", default=16)
    window = keys.integer("fp16.loss_scale_window", "GradScaler(growth_interval=...)", default=1000)
    if fixed:
        return {"init_scale": float(fixed), "growth_interval": 2**31 - 1}
    return {"init_scale": 2.0**power, "growth_interval": window}


def _batches(keys: Keys, run: dict[str, Any], world_size: int | None) -> int:
    total = keys.integer("train_batch_size", "global_batch_size")
    micro = keys.integer("train_micro_batch_size_per_gpu", "micro_batch_size")
    accumulated = keys.integer(
        "gradient_accumulation_steps",
        "global_batch_size / (micro_batch_size x ranks)",
        "or set_requires_gradient_sync(False) before all backwards of an update but the last",
    )
    sizes = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulated, "ranks": world_size}
    given = {name: size for name, size in sizes.items() if size is not None}
    if 0 in (total, *given.values()):
        keys.problem("train_batch_size and what makes it, sizes of forwards, accumulation and ranks, are at least 1")
        return 1
    implied = math.prod(given.values())
    if total is not None and (total % implied or (len(given) == len(sizes) and total != implied)):
        words = " x ".join(f"{name}={size}" for name, size in given.items())
        keys.problem(
            f"train_batch_size={total} is not {words} = {implied}, or, with what is not said, a multiple of it"
        )
    elif total is not None and world_size:
        accumulated = accumulated if micro is None else total // (micro * world_size)
        micro = micro if accumulated is None else total // (accumulated * world_size)
    elif micro is not None and world_size:
        total = implied
    run |= {name: size for name, size in (("global_batch_size", total), ("micro_batch_size", micro)) if size}
    return accumulated or 1


def _optimizer(keys: Keys, run: dict[str, Any]) -> dict[str, Any]:
    kind = keys.take("optimizer.type", "yafsdp_like.optim.AdamW", "torch.optim's optimizers may be used as well")
    if kind is not None and str(kind).lower() not in ADAMS:
        keys.problem(
            f"optimizer.type {kind!r} is not supported: use AdamW, or make an optimizer of torch.optim yourself"
        )
    params = "optimizer.params"
    is_coupled = str(kind).lower() != "adamw" and keys.get(f"{params}.adam_w_mode") is False
    if is_coupled and keys.get(f"{params}.weight_decay", 0):
        keys.problem(f"{params}.adam_w_mode=false with weight_decay is torch.optim.Adam: make it yourself")
    if keys.get(f"{params}.bias_correction") is False:
        keys.problem(f"{params}.bias_correction=false is not supported")
    found: dict[str, Any] = {}
    for name, note in (("lr", ""), ("eps", ""), ("weight_decay", "launch.train decays matrices only")):
        value = keys.number(f"{params}.{name}", f"optimizer.{name}", note)
        found |= {} if value is None else {name: value}
    given = keys.take(f"{params}.betas", "optimizer.betas")
    betas = tuple(map(as_number, given)) if isinstance(given, list) else ()
    if len(betas) == 2 and None not in betas:
        found["betas"] = tuple(map(float, betas))
    elif given is not None:
        keys.problem(f"{params}.betas must be two numbers, found {given!r}")
    if kind is not None:
        torch_decays = keys.get(f"{params}.torch_adam") is True and not is_coupled
        defaults = DEFAULTS | ({"weight_decay": 0.01} if torch_decays else {})
        found = {name: value for name, value in defaults.items() if not keys.is_open(f"{params}.{name}")} | found
    run |= {f"optimizer.{name}": list(value) if name == "betas" else value for name, value in found.items()}
    if run.get("optimizer.offload_moments"):
        found["offload_moments"] = True
    return found


def _clipping(keys: Keys, run: dict[str, Any]) -> dict[str, Any]:
    norm = keys.number("gradient_clipping", "optimizer.max_grad_norm, AdamW(max_norm=...)", "0: never", default=0)
    if not keys.is_open("gradient_clipping"):
        run["optimizer.max_grad_norm"] = norm or None
    return {"max_norm": float(norm)} if norm else {}


def _scheduler(keys: Keys, run: dict[str, Any]) -> None:
    kind = keys.take("scheduler.type", "optimizer.num_warmup_steps and final_lr_ratio", _shape_of(keys))
    known = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
    if kind is not None and kind not in known:
        keys.problem(f"scheduler.type {kind!r} is not supported: use one of {', '.join(known)}, or torch's schedulers")
    steps = keys.integer("scheduler.params.warmup_num_steps", "optimizer.num_warmup_steps")
    total = keys.integer("scheduler.params.total_num_steps", "num_steps")
    highest = keys.number("scheduler.params.warmup_max_lr", "optimizer.lr")
    last = keys.number("scheduler.params.cos_min_ratio", "optimizer.final_lr_ratio", default=0.0001)
    keys.ignore(
        {
            "scheduler.params.warmup_min_lr": "the warm-up begins at lr / num_warmup_steps",
            "scheduler.params.warmup_min_ratio": "the warm-up begins at lr / num_warmup_steps",
            "scheduler.params.warmup_type": "the warm-up is linear",
            "scheduler.params.last_batch_iteration": "a checkpoint holds the step",
        }
    )
    if kind is None and keys.get("optimizer.type") is not None and not keys.leaves_open:
        run |= {"optimizer.num_warmup_steps": 0, "optimizer.final_lr_ratio": 1.0}
    if kind in known:
        if steps is None and not keys.is_open("scheduler.params.warmup_num_steps"):
            steps = WARMUP_STEPS
        if highest is None and kind == "WarmupDecayLR" and not keys.is_open("scheduler.params.warmup_max_lr"):
            highest = DECAY_LR
        run["optimizer.final_lr_ratio"] = {"WarmupLR": 1.0, "WarmupDecayLR": 0.0}.get(str(kind), last)
    for name, value in (("optimizer.num_warmup_steps", steps), ("num_steps", total)):
        run |= {} if value is None else {name: value}
    if highest is not None:
        run.setdefault("optimizer.lr", highest)
        if run["optimizer.lr"] != highest:
            keys.problem(
                f"scheduler.params.warmup_max_lr={highest} (0.001 unless said) contradicts optimizer.params.lr="
                f"{run['optimizer.lr']}"
            )


def _shape_of(keys: Keys) -> str:
    """Return what differs between DeepSpeed's schedule and that of launch.train."""
    words = (
        [] if keys.get("scheduler.params.warmup_type") == "linear" else ["the warm-up is linear here, not logarithmic"]
    )
    if keys.get("scheduler.type") == "WarmupDecayLR":
        words.append("the decay to 0 is a cosine here, not a line")
    return "; ".join(words)


def _logging(keys: Keys, run: dict[str, Any]) -> None:
    every = keys.number("steps_per_print", "log.every")
    run |= {} if not every or every > 10**9 else {"log.every": int(every)}
    if keys.get("tensorboard.enabled") is not None:
        run["log.tensorboard"] = keys.flag("tensorboard.enabled", "log.tensorboard")
    if keys.flag("prescale_gradients", "set_gradient_divide_factor(...)"):
        keys.problem("prescale_gradients: sums are divided once, exactly; leave it out")
    factor = keys.number("gradient_predivide_factor", "gradients are averaged in any case", default=1.0)
    if factor != 1.0:
        keys.problem(f"gradient_predivide_factor={factor}: leave it out, or call set_gradient_divide_factor")
    if (operation := keys.take("gradient_allreduce_op", "gradients are averaged", default="mean")) != "mean":
        keys.problem(f"gradient_allreduce_op={operation!r}: call set_gradient_divide_factor(1.0) for sums")
    keys.ignore({"managed_gradient_accumulation": "whoever calls backward says when gradients are synced"})
