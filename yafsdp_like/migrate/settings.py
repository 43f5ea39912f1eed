"""Settings read from another library's configuration, with what became of each of its keys. Imports no torch.

Owns the bookkeeping that no key is left out: one that no reader knows, or that contradicts another, is an error, and
all such are in one.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

AUTO = "auto"  # in a DeepSpeed file: whoever starts the run sets it
DTYPES = {"bf16": "bfloat16", "bfp16": "bfloat16", "bfloat16": "bfloat16"}
DTYPES |= {"fp16": "float16", "float16": "float16", "half": "float16", "fp32": "float32", "float32": "float32"}
OFF = (None, False, 0, "none")
NUM_COLUMNS = 3


@dataclass(frozen=True)
class Key:
    """One key of the configuration that was read: what it became here, or "" and why it was ignored."""

    name: str
    value: Any
    becomes: str
    note: str = ""


@dataclass(frozen=True)
class ForeignSettings:
    """What a foreign configuration asks for, in this package's words."""

    source: str
    keys: tuple[Key, ...]
    param_dtype: str | None = None  # of forward and backward; None: the parameters' own
    reduce_dtype: str | None = None
    output_dtype: str | None = None
    reshard_after_forward: bool | int | None = None
    cpu_offload: bool = False  # parameters, gradients and the optimizer in host memory
    pin_memory: bool = True
    mesh_shape: tuple[int, int] | None = None  # (ranks that replicate, ranks that shard); None: all shard
    wrapped: tuple[str, ...] = ()  # names of the classes whose modules are sharded one by one
    adamw: Mapping[str, Any] = field(default_factory=dict)  # arguments of yafsdp_like.optim.AdamW
    grad_scaler: Mapping[str, Any] | None = None  # arguments of torch.amp.GradScaler, for float16
    num_accumulated: int = 1  # backwards per update
    run: Mapping[str, Any] = field(default_factory=dict)  # keys of launch.train, dotted
    torchrun: tuple[str, ...] = ()  # arguments of torchrun

    def fully_shard_options(self) -> dict[str, Any]:
        """Return the keyword arguments for each call of ``fully_shard``.

        With ``mesh_shape`` it makes the mesh, which every rank must do, once the process group is there.
        """
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        names = ("param_dtype", "reduce_dtype", "output_dtype")
        dtypes = {name: getattr(torch, getattr(self, name)) for name in names if getattr(self, name) is not None}
        options: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(**dtypes)}
        if self.reshard_after_forward is not None:
            options["reshard_after_forward"] = self.reshard_after_forward
        if self.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.pin_memory)
        if self.mesh_shape is not None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            options["mesh"] = init_device_mesh(device, self.mesh_shape, mesh_dim_names=("replicate", "shard"))
        return options

    def __str__(self) -> str:
        """Return a table with a line for each key."""
        rows = [
            (key.name, json.dumps(key.value, default=str), "; ".join(filter(None, (_arrow(key), key.note))))
            for key in self.keys
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(NUM_COLUMNS - 1)]
        lines = [f"{name:<{widths[0]}}  {value:<{widths[1]}}  {what}" for name, value, what in rows]
        return "\n".join([f"{self.source}: {len(rows)} keys", *lines])


def _arrow(key: Key) -> str:
    return f"-> {key.becomes}" if key.becomes else "ignored"


class Keys:
    """The keys of a configuration while it is read: each is taken, or ignored for a reason."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self._source = source
        self._values = dict(_flat(values))
        self._read: dict[str, Key] = {}
        self._problems: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """Look at a value without taking it; what is "auto" or null is not given."""
        value = self._values.get(name)
        return default if value is None or value == AUTO else value

    def is_open(self, name: str) -> bool:
        """Whether the file leaves a value to whoever starts the run."""
        return bool(self._values.get(name) == AUTO)

    @property
    def leaves_open(self) -> bool:
        """Whether the file leaves anything to whoever starts the run, as those for Hugging Face's Trainer do."""
        return AUTO in self._values.values()

    def take(self, name: str, becomes: str, note: str = "", default: Any = None) -> Any:
        """Return a value that becomes something here; `default` where it is not given."""
        if name not in self._values:
            return default
        value = self._values[name]
        if value is None or value == AUTO:
            self._read[name] = Key(name, value, "", "it is left open: whoever starts the run says it")
            return default
        self._read[name] = Key(name, value, becomes, note)
        return value

    def number(self, name: str, becomes: str, note: str = "", default: Any = None) -> Any:
        """As `take`, for a number (texts such as "1e-3" are some)."""
        given = self.take(name, becomes, note, default)
        value = as_number(given)
        if given is not None and (value is None or not value >= 0):
            self.problem(f"{name} must be a number of at least 0, found {given!r}")
            return default
        return value

    def integer(self, name: str, becomes: str, note: str = "", default: int | None = None) -> Any:
        """As `number`, for a whole one."""
        value = self.number(name, becomes, note, default)
        if value is not None and (math.isinf(value) or value != int(value)):
            self.problem(f"{name} must be a whole number, found {value!r}")
            return default
        return None if value is None else int(value)

    def flag(self, name: str, becomes: str, note: str = "", default: bool = False) -> bool:
        """As `take`, for what is on or off."""
        value = self.take(name, becomes, note, default)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            self.problem(f"{name} must be true or false, found {value!r}")
            return default
        return value

    def dtype(self, name: str, becomes: str) -> str | None:
        """As `take`, for a dtype by any of its names."""
        value = self.take(name, becomes)
        if value is None or str(value).lower() in DTYPES:
            return None if value is None else DTYPES[str(value).lower()]
        self.problem(f"{name} must be one of {', '.join(sorted(DTYPES))}, found {value!r}")
        return None

    def ignore(self, reasons: Mapping[str, str]) -> None:
        """Ignore keys, by name or by the section that they are in ("aio."), for these reasons."""
        for name, value in self._values.items():
            for known, why in reasons.items():
                if name not in self._read and (name == known or (known.endswith(".") and name.startswith(known))):
                    self._read[name] = Key(name, value, "", why)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Take no part in what these keys switch on; off, or as they are by default, they are ignored."""
        for name, value in list(self._values.items()):
            sections = (known for known in reasons if known.endswith(".") and name.startswith(known))
            known = name if name in reasons else next(sections, None)
            if known is None or name in self._read:
                continue
            if self._is_on(known):
                self.problem(f"{name}={value!r}: {reasons[known]}")
            self._read[name] = Key(name, value, "", "it is off")

    def _is_on(self, name: str) -> bool:
        """Whether a key is, or a section: by its own `enabled`, or by those of its parts where it has none."""
        if not name.endswith("."):
            return self.get(name) not in OFF
        inside = [key for key in self._values if key.startswith(name) and key.endswith(".enabled")]
        switches = [f"{name}enabled"] if f"{name}enabled" in inside else inside
        return not switches or any(self.get(key) not in OFF for key in switches)

    def problem(self, words: str) -> None:
        """Note what is wrong, for the one error at the end."""
        self._problems.append(words)

    def finish(self, known: Collection[str] = ()) -> tuple[Key, ...]:
        """Return every key in the order of the file.

        Raises ``ValueError`` with all problems, and with every key that nobody has taken, near to which of `known`.
        """
        for name, value in self._values.items():
            if name not in self._read and value == {} and any(key.startswith(f"{name}.") for key in known):
                self._read[name] = Key(name, value, "", "it is empty")
            elif name not in self._read:
                near = difflib.get_close_matches(name, [*known, *self._read], 1)
                self._problems.append(f"unknown key {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        if self._problems:
            raise ValueError(f"{self._source}: " + "; ".join(self._problems))
        return tuple(self._read[name] for name in self._values)


def as_number(value: Any) -> Any:
    """Return an int or float as it is, and that of a text; None for what is no number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        inside = isinstance(value, dict) and value
        found += _flat(value, f"{prefix}{name}.") if inside else [(f"{prefix}{name}", value)]
    return found


def load_mapping(config: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and content of a JSON or YAML file, or of what was parsed already.

    Raises ``ValueError`` for what cannot be read, or is no mapping.
    """
    if not isinstance(config, (str, Path)):
        return "configuration", dict(config)
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ValueError(f"{path} is not {kind}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values, found a {type(values).__name__}")
    return str(path), values
