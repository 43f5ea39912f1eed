"""The options of a model that is served, on the command line: here and over HTTP.

Owns what they are called, what may stand in them, and how a command says what is wrong: one line, exit status 2 for the
command line and 1 for the rest. Imports nothing that takes time, so that `--help` and mistakes are answered at once;
the way from options to an engine is opening.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from launch.opening import Opened

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
MODES = ("auto", "resident", "gathered", "streamed", "tensor_parallel")
DTYPES = ("float32", "bfloat16")
PRESET = "preset:"
NO_DEFAULTS = "none"  # of the model
NUMBERS: dict[object, str] = {int: "int", float: "float"}


class Help(argparse.HelpFormatter):
    """Says the default of every option that has one, and what kind of number it takes."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        kind = f" ({NUMBERS[action.type]})" if action.type in NUMBERS else ""
        is_said = action.help is None or "default" in action.help
        has_none = action.default is None or isinstance(action.default, (bool, list))
        if is_said or has_none or action.default == argparse.SUPPRESS:
            return f"{action.help or ''}{kind}"
        return f"{action.help}{kind}; default: %(default)s"


class HelpAsWritten(Help, argparse.RawDescriptionHelpFormatter):
    """The same below a description that keeps its lines."""


class Parser(argparse.ArgumentParser):
    """An error is one line; options are not guessed from their beginnings."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")


# --- values ---


def nbytes(text: str) -> int:
    """Bytes of "40GiB", "1.5 GB" or "4096". Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2] not in UNITS:
        known = ", ".join(unit for unit in UNITS if unit)
        raise ValueError(f"expected a number of bytes such as 40GiB (units: {known}), found {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def nbytes_argument(text: str) -> int:
    try:
        return nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number in a range."""
    said = f"at least {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, {said}, found {text!r}") from None
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"must be {said}, found {number}")
        return number

    return read


def number(least: float, most: float) -> Callable[[str], float]:
    """A number in a range."""

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None
        if not least <= found <= most:  # which no NaN is
            raise argparse.ArgumentTypeError(f"must be from {least:g} to {most:g}, found {text}")
        return found

    return read


def seconds(text: str) -> float:
    """Of a time that passes: neither negative nor endless."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, found {text!r}") from None
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, not negative, found {text}")
    return number


# --- a model ---


def add_model_arguments(parser: argparse.ArgumentParser, max_batch_size: int, max_batch_tokens: int) -> None:
    """What model, where and how large; the defaults of batches are the caller's."""
    parser.add_argument(
        "model", metavar="MODEL", help="Hugging Face directory, checkpoint (step-N), or preset:NAME with random weights"
    )
    group = parser.add_argument_group("model and memory")
    group.add_argument("--tokenizer", metavar="DIRECTORY", help="if it is not the model's own")
    group.add_argument(
        "--generation-config",
        default="model",
        choices=("model", NO_DEFAULTS),
        help=f"whether sampling that is not said is as the model's generation_config.json says ({NO_DEFAULTS}: not)",
    )
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where it runs")
    group.add_argument("--dtype", choices=DTYPES, help="of weights; default: bfloat16 on a GPU, float32 on a CPU")
    group.add_argument("--mode", default="auto", choices=MODES, help="where weights lie")
    group.add_argument(
        "--memory-limit",
        type=nbytes_argument,
        metavar="BYTES",
        help="everything planned on one device, such as 40GiB; default on a GPU: what is free, less 1GiB for libraries",
    )
    group.add_argument(
        "--kv-memory",
        type=nbytes_argument,
        metavar="BYTES",
        help="keys and values; default: what the limit leaves; on a CPU without a limit 1GiB",
    )
    group.add_argument("--host-kv", type=nbytes_argument, default=0, metavar="BYTES", help="for swapped ones")
    group.add_argument("--kv-dtype", choices=("float32", "bfloat16", "float8_e4m3fn"), help="default: the weights'")
    group.add_argument("--max-seq-len", type=whole(1), metavar="TOKENS", help="default: what fits, up to the model's")
    group.add_argument(
        "--max-batch-size", type=whole(1), default=max_batch_size, metavar="SEQUENCES", help="that run at a time"
    )
    group.add_argument(
        "--max-batch-tokens", type=whole(1), default=max_batch_tokens, metavar="TOKENS", help="of one step"
    )
    group.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")


def check_model(name: str) -> None:
    """Raises ValueError where there is certainly no model; what is in a directory is seen when it is read."""
    if not name.startswith(PRESET) and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"expected a Hugging Face directory, a checkpoint (step-N) or {PRESET}NAME, found {name!r}: there is no "
            "such directory"
        )


def model_names(name: str) -> tuple[str, ...]:
    """What a model may be called by those who ask for it: the last part of its path first, then the path as given, and
    without a slash at its end.
    """
    path = Path(name).expanduser()
    last = name if name.startswith(PRESET) else path.name or path.resolve().name
    return tuple(dict.fromkeys((last or name, name, name.rstrip("/") or name)))


# --- the command ---


@contextlib.contextmanager
def opened(arguments: argparse.Namespace, max_waiting: int, say: Callable[[str], None]) -> Iterator[Opened]:
    """The model that was asked for: see opening.py, which is imported once there may be one."""
    check_model(arguments.model)
    from launch import opening

    with opening.opened(arguments, max_waiting, say) as model:
        yield model


def exit_status(run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Of a command that does `run`: 0, 1 after a line that says what is wrong, 130 after an interrupt."""
    try:
        run(arguments)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    except (MemoryError, RuntimeError) as error:
        from launch.complaints import NO_MEMORY  # here: torch is there by now

        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        print(f"error: {first}; or lower --memory-limit or --kv-memory", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
