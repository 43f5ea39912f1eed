"""What training a model will take of each GPU, and whether it fits: without a GPU, in seconds.

    python -m launch.plan configs/8b.yaml --world-size 2 --gpu-memory 80GiB
    python -m launch.plan preset:70b --world-size 1024 --seq-len 8192 --optimizer.moments=bf16
    python -m launch.plan mypackage.models:build --json plan.json
    python -m launch.plan preset:8b --serve --gpu-memory 80GiB --slot-map map.html

``--fit 80GiB`` finds what fits such a GPU (sequences of a forward, formats of moments, checkpointing, offloading), with
the predicted time of each, and where nothing does, the smallest changes that would: fewer tokens or more ranks too.

Exit status 0 if it fits, or nothing was said of how large a GPU is; 1 if it does not; 2 after a mistake, of
the model's code too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.command_line import check_directory, nbytes
from launch.config import COMMAND, Config

if TYPE_CHECKING:
    from yafsdp_like.shard.forecast.quantities import TrainingForecast

PRESET = "preset:"
DOES_NOT_FIT, MISTAKE, INTERRUPTED = 1, 2, 130
HELP = """a training configuration (YAML); or preset:NAME; or a directory with a Hugging Face config.json; or
package.module:function, which returns a module. Options of launch.train follow, as --section.key=value"""


def size(text: str) -> int:
    """Return the bytes that an option asks for; what is wrong with others is said in argparse's words."""
    try:
        return nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    """Return what reads this command's own options; all others are of a training run."""
    found = argparse.ArgumentParser(
        "python -m launch.plan", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    found.add_argument("model", metavar="CONFIG|MODEL", help=HELP)
    found.add_argument("--world-size", type=int, help="ranks (default: the GPUs of this host, or 1)")
    found.add_argument("--ranks-per-host", type=int, default=8, help="of which each host has so many (default: 8)")
    found.add_argument("--replicas", type=int, default=1, help="that each hold the whole model (default: 1)")
    found.add_argument("--gpu-memory", type=size, metavar="BYTES", help="of each GPU, such as 80GiB")
    found.add_argument("--fit", type=size, metavar="BYTES", help="find what fits such a GPU, and what it costs")
    found.add_argument("--seq-len", type=int, help="tokens of a sequence")
    found.add_argument("--micro-batch", type=int, help="sequences of one forward on one rank")
    found.add_argument("--serve", action="store_true", help="plan serving instead; --serve --help has its options")
    found.add_argument("--slot-map", type=Path, metavar="FILE", help="draw when each slot is live, as .html or .png")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the forecast as data; - is standard output")
    return found


def configuration(asked: argparse.Namespace, others: Sequence[str], num_ranks: int) -> Config:
    """Return the training configuration that is forecast; ValueError for one that cannot be.

    Where only a model is named, or sequences of one forward are asked for, the global batch is what all ranks take at
    once.
    """
    model = asked.model
    is_file = Path(model).is_file()
    if is_file:
        first = [model]
    elif model.startswith(PRESET):
        first = [f"--model.preset={model.removeprefix(PRESET)}"]
    elif Path(model).is_dir():
        first = [f"--model.hf_dir={model}"]
    elif ":" in model:
        first = [f"--model.factory={model}"]
    else:
        raise ValueError(f"{model!r} is no file, no directory, no preset:NAME and no package.module:function")
    more = [] if asked.seq_len is None else [f"--seq_len={asked.seq_len}"]
    if asked.micro_batch is not None or not is_file:
        size = 1 if asked.micro_batch is None else asked.micro_batch
        more += [f"--micro_batch_size={size}", f"--global_batch_size={size * num_ranks}"]
    return COMMAND.load([*first, *more, *others])


def described(forecast: TrainingForecast, options: Config, device_nbytes: int | None) -> str:
    """Return what a person reads."""
    from launch.fit import predicted_time
    from launch.forecast import TrainingStepShape
    from yafsdp_like.memory.plan import readable

    shape = TrainingStepShape.of(options, forecast.plan.world_size)
    head = (
        f"one rank of {forecast.plan.world_size} ({'; '.join(forecast.plan.transports)}), {shape.micro_batch_size} × "
        f"{shape.seq_len} tokens a forward, {shape.num_accumulated} forward{'s' * (shape.num_accumulated > 1)} a step"
    )
    lines = [head, "", str(forecast), str(predicted_time(options, forecast))]
    lines += [f"note: {note}" for note in forecast.notes]
    if device_nbytes is not None:
        left = device_nbytes - forecast.peak.total_nbytes
        words = f"fits into {readable(device_nbytes)}: {readable(left)} are left"
        if left < 0:
            words = f"does not fit into {readable(device_nbytes)}: {readable(-left)} too much"
        lines.append(words)
    return "\n".join(lines)


def answer(asked: argparse.Namespace, others: Sequence[str]) -> int:
    """Forecast, print and write; return the exit status."""
    import torch

    from launch import fit, slot_map
    from launch.forecast import forecast_of
    from yafsdp_like.shard.forecast.traced_units import Cluster

    for name in ("world_size", "ranks_per_host", "replicas", "seq_len", "micro_batch"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, found {value}")
    if asked.slot_map is not None:
        slot_map.check_path(asked.slot_map)
    if asked.json is not None:
        check_directory(asked.json)
    num_ranks = asked.world_size if asked.world_size is not None else torch.cuda.device_count() or 1
    cluster = Cluster(num_ranks, asked.ranks_per_host, asked.replicas)
    options = configuration(asked, others, num_ranks)
    forecast = forecast_of(options, cluster)
    if asked.slot_map is not None:
        slot_map.draw(forecast.plan, asked.slot_map, f"{asked.model} on {num_ranks} ranks")
    fits = asked.gpu_memory is None or forecast.fits(asked.gpu_memory)
    data: dict[str, Any] = {**forecast.as_dict(), "fits": fits, "gpu_memory_nbytes": asked.gpu_memory}
    data["step_time"] = dataclasses.asdict(fit.predicted_time(options, forecast))
    found = None if asked.fit is None else fit.report(options, forecast, cluster, asked.fit)
    if found is not None:
        fits, data["fit"] = fits and found.fits, fit.as_data(found)
    if asked.json is None or str(asked.json) != "-":
        print(described(forecast, options, asked.gpu_memory))
        if found is not None:
            print(f"\n{found.text}")
        if asked.json is not None:
            asked.json.write_text(json.dumps(data, indent=2) + "\n")
    else:
        print(json.dumps(data))
    return 0 if fits else DOES_NOT_FIT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--serve" in arguments:
        from launch import plan_serve

        return plan_serve.main([argument for argument in arguments if argument != "--serve"])
    try:
        own, others = parser().parse_known_args(arguments)
    except SystemExit as end:  # after --help, or a mistake that argparse has told
        return MISTAKE if end.code else 0
    try:
        return answer(own, others)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:  # of the model that was traced, most often: its author needs the line
        traceback.print_exc()
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
