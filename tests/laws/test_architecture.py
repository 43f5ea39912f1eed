"""The shape of the package, read from its source: who may import whom, and which file alone may do what.

Every check is a function from source to findings, and is shown to find an offence before it is trusted to find none.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "yafsdp_like"


@dataclass(frozen=True)
class Source:
    """One module of the package: its path from the repository's root, its text, and what its names stand for."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return parsed(self.text)

    @property
    def part(self) -> str:
        """The folder of the package that the module is in; "" for the package's own `__init__`."""
        return part_of(self.path.removesuffix(".py").replace("/", "."))

    def where(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"

    def imports(self) -> Iterator[tuple[ast.AST, str, str]]:
        """(node, name here, full dotted name) of everything imported, also under `if TYPE_CHECKING` and in bodies."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node, alias.asname or alias.name.split(".")[0], alias.name
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(node)
                for alias in node.names:
                    yield node, alias.asname or alias.name, f"{origin}.{alias.name}"

    def _origin(self, node: ast.ImportFrom) -> str:
        """The module that a `from` import names, made absolute."""
        if not node.level:
            return node.module or ""
        parents = self.path.split("/")[: -node.level]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def names(self) -> dict[str, str]:
        """What each imported name stands for: `import torch.cuda` gives torch, `import a.b as c` gives c -> a.b."""
        return {
            here: here if isinstance(node, ast.Import) and full.startswith(f"{here}.") else full
            for node, here, full in self.imports()
        }

    def mentions(self) -> Iterator[tuple[ast.AST, str]]:
        """Every dotted name in the code, and every name imported, in full: `dist.barrier` as torch.distributed.barrier.

        What a name assigned here stands for is not known: `self.group.barrier` is ".group.barrier" with a dot before.
        """
        names = self.names()
        for node, _, full in self.imports():
            yield node, full
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute):
                yield node, dotted(node, names)

    def calls(self) -> Iterator[tuple[ast.Call, str]]:
        names = self.names()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield node, dotted(node.func, names)


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def dotted(node: ast.AST, names: Mapping[str, str]) -> str:
    """`a.b.c` in full; what it starts with, if no imported name, is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, "") if isinstance(node, ast.Name) else ""


def part_of(dotted_name: str) -> str:
    """`yafsdp_like.shard.unit` is in "shard"; the package itself, and what it re-exports, in ""."""
    folder = dotted_name.split(".")[1:2]
    return folder[0] if folder and folder[0] in LEVELS else ""


def sources() -> list[Source]:
    return [
        Source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in sorted((ROOT / PACKAGE).rglob("*.py"))
    ]


Check = Callable[[Source], list[str]]

# --- imports go one way ---

LEVELS = {  # a part imports from parts below it; parts of one level, as long as there is no cycle, from each other
    "memory": 0,
    "kernels": 0,
    "ops": 1,
    "comm": 1,
    "models": 2,
    "shard": 2,
    "optim": 2,
    "checkpoint": 2,
    "data": 2,
    "inference": 3,
    "": 4,  # the package's own __init__, which re-exports
}
ALONE = {"memory", "kernels"}  # import nothing of the package but themselves
OUTSIDE = {"scripts", "launch", "tests"}  # stand above the package


def imports_upwards(source: Source) -> list[str]:
    """Imports of the package's own modules that go up or, from memory and kernels, anywhere else."""
    findings = []
    for node, _, full in source.imports():
        target = part_of(full)
        package = full.split(".")[0]
        if package in OUTSIDE:
            findings.append(f"{source.where(node)}: imports {full}, which stands above the package")
        if package != PACKAGE or (target and target == source.part):
            continue
        if LEVELS[target] > LEVELS[source.part] or not target or source.part in ALONE:
            findings.append(f"{source.where(node)}: {source.part or PACKAGE} imports {full}")
    return findings


def cycle_of_parts(modules: Iterable[Source]) -> list[str]:
    """One cycle among the package's folders, if there is any."""
    graph: dict[str, set[str]] = {}
    for source in modules:
        targets = {part_of(full) for _, _, full in source.imports() if full.split(".")[0] == PACKAGE}
        graph.setdefault(source.part, set()).update(targets - {source.part})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" imports ".join(error.args[1][::-1])]
    return []


# --- what one file alone may do ---

FACTORIES = re.compile(
    r"torch\.(empty|zeros|ones|full|rand|randn|randint)(_like)?"
    r"|torch\.distributed\._symmetric_memory\.empty"
    r"|torch\.(empty_strided|empty_permuted|randperm|normal|arange|linspace|logspace|eye|tensor|from_numpy|frombuffer"
    r"|UntypedStorage|(\w+\.)*\w*Tensor|(\w+\.)*\w*Storage)"
    r"|.*\.new_(empty|zeros|ones|full|tensor|empty_strided)"
)
COLLECTIVES = re.compile(
    r"torch\.distributed\.(all_gather|all_reduce|all_to_all|reduce|reduce_scatter|scatter|gather|broadcast|send|recv"
    r"|isend|irecv|batch_isend_irecv|barrier|monitored_barrier|new_group|new_subgroups)\w*"
    r"|torch\.distributed\._functional_collectives.*"
    r"|.*\.(allgather|allreduce|alltoall|_allgather|_reduce_scatter|reduce_scatter_|all_gather_)\w*"
    r"|.*\.(?!stream_barrier$)\w*(_coalesced|barrier)"  # that one is a transport's
)
STREAMS = re.compile(r"torch(\.\w+)*\.(Stream|ExternalStream|Event)")


def allocations(source: Source) -> list[str]:
    """Calls that make a tensor with memory of its own; `device="meta"` makes one without."""
    return [
        f"{source.where(call)}: {name or 'a call'}"
        for call, name in source.calls()
        if FACTORIES.fullmatch(name) and not on_meta(call)
    ]


def on_meta(call: ast.Call) -> bool:
    """Whether the call says `device="meta"`, literally."""
    return any(
        keyword.arg == "device" and isinstance(keyword.value, ast.Constant) and keyword.value.value == "meta"
        for keyword in call.keywords
    )


def collectives(source: Source) -> list[str]:
    """Collectives of torch.distributed, by function or by method of a group, called or only mentioned."""
    return [f"{source.where(node)}: {name}" for node, name in source.mentions() if COLLECTIVES.fullmatch(name)]


def streams_and_events(source: Source) -> list[str]:
    return [f"{source.where(node)}: {name}" for node, name in source.mentions() if STREAMS.fullmatch(name)]


def record_stream(source: Source) -> list[str]:
    return [
        f"{source.where(node)}: {name}" for node, name in source.mentions() if name.split(".")[-1] == "record_stream"
    ]


# --- names and words ---


def missing_docstring(source: Source) -> list[str]:
    return [] if ast.get_docstring(source.tree) else [f"{source.path}: says nothing of what it is for"]


def name_that_fits_nowhere(source: Source) -> list[str]:
    fits_nowhere = re.search(r"(^|[/_])(utils?|common|helpers?|misc)(\.py|/)", source.path)
    return [f"{source.path}: a name that fits nowhere is a design question"] if fits_nowhere else []


# --- the package ---


Paths = str | tuple[str, ...]
RULES: dict[Check, tuple[Iterable[str], Paths]] = {  # the parts that a check is for, and the paths that are excepted
    imports_upwards: (LEVELS, ""),
    allocations: (("memory", "comm", "shard"), (f"{PACKAGE}/memory/arena.py", f"{PACKAGE}/memory/vmm.py")),
    collectives: (LEVELS, f"{PACKAGE}/comm/"),
    streams_and_events: (LEVELS, f"{PACKAGE}/memory/streams.py"),
    record_stream: (LEVELS, ""),
    missing_docstring: (LEVELS, ""),
    name_that_fits_nowhere: (LEVELS, ""),
}


@pytest.mark.parametrize("check", RULES)
def test_the_package_holds_no(check: Check) -> None:
    """The excepted paths are where the thing is done: a check that finds nothing even there would prove nothing."""
    parts, excepted = RULES[check]
    allowed, findings = [], []
    for source in sources():
        if source.part in parts:
            (allowed if excepted and source.path.startswith(excepted) else findings).extend(check(source))
    assert findings == []
    assert bool(allowed) == bool(excepted)


def test_parts_do_not_import_each_other_in_a_circle() -> None:
    assert cycle_of_parts(sources()) == []


def test_every_folder_of_the_package_has_a_level() -> None:
    """Prevents: a new folder that no rule covers."""
    folders = {Path(source.path).parts[1] for source in sources() if len(Path(source.path).parts) > 2}
    assert folders <= set(LEVELS)


# --- the checks themselves ---


def offences(check: Check, text: str, path: str) -> int:
    return len(check(Source(f"{PACKAGE}/{path}", text)))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("memory/plan.py", "from yafsdp_like.comm.transport import Transport"),
        ("memory/plan.py", "from yafsdp_like.kernels import cast"),
        ("memory/plan.py", "def f():\n    import yafsdp_like.shard.unit as unit"),
        ("kernels/cast.py", "from yafsdp_like.memory.layout import aligned"),
        ("comm/peer.py", "from ..shard.engine import Engine"),
        ("comm/peer.py", "from .. import shard"),
        ("comm/peer.py", "if TYPE_CHECKING:\n    from yafsdp_like import shard"),
        ("shard/engine.py", "from yafsdp_like import fully_shard"),
        ("shard/engine.py", "import yafsdp_like"),
        ("shard/engine.py", "from yafsdp_like.inference.engine.scheduler import Scheduler"),
        ("inference/http/server.py", "from launch.serve import main"),
        ("inference/http/server.py", "from scripts import bench_train"),
        ("shard/engine.py", "from tests.zoo import Block"),
    ],
)
def test_an_import_that_goes_up_is_found(path: str, text: str) -> None:
    assert offences(imports_upwards, text, path) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("memory/plan.py", "from yafsdp_like.memory.layout import Segment\nfrom . import arena\nimport torch"),
        ("comm/peer.py", "from yafsdp_like.memory import layout\nfrom ..memory.layout import Segment"),
        ("shard/engine.py", "from yafsdp_like.comm.transport import Transport\nimport yafsdp_like.kernels.cast"),
        ("inference/http/server.py", "from yafsdp_like.models.decoder import Decoder"),
        ("__init__.py", "from yafsdp_like.inference.http.server import Server\nfrom .shard.api import fully_shard"),
    ],
)
def test_an_import_that_goes_down_is_not(path: str, text: str) -> None:
    assert offences(imports_upwards, text, path) == 0


def test_a_cycle_of_parts_on_one_level_is_found() -> None:
    optim = Source(f"{PACKAGE}/optim/flat.py", "from yafsdp_like.shard.unit import Unit")
    shard = Source(f"{PACKAGE}/shard/engine.py", "from yafsdp_like.optim.flat import update")
    (cycle,) = cycle_of_parts([optim, shard])
    assert cycle in ("optim imports shard imports optim", "shard imports optim imports shard")
    assert cycle_of_parts([optim]) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nx = torch.empty(3)",
        "from torch.distributed import _symmetric_memory\nx = _symmetric_memory.empty(3)",
        "import torch as t\nx = t.zeros(3, device='cuda')",
        "from torch import full\nx = full((3,), 1.0)",
        "import torch\nx = torch.randn(3, device=device)",
        "import torch\nx = torch.zeros_like(y)",
        "import torch\nx = y.new_empty(3)",
        "import torch\nx = torch.empty(3, device='meta').new_zeros(3)",
        "import torch\nx = torch.UntypedStorage(3)",
        "import torch\nx = torch.cuda.FloatTensor(3)",
    ],
)
def test_an_allocation_is_found(text: str) -> None:
    assert offences(allocations, text, "shard/unit.py") == 1


def test_placeholders_on_meta_and_types_are_no_allocation() -> None:
    text = "import torch\nx: torch.Tensor = torch.empty(3, device='meta')\nisinstance(x, torch.Tensor)\ny = empty(3)"
    assert offences(allocations, text, "shard/unit.py") == 0


@pytest.mark.parametrize(
    "text",
    [
        "import torch.distributed as dist\ndist.all_gather_into_tensor(x, y)",
        "import torch.distributed as dist\nf = dist.all_reduce",
        "from torch.distributed import barrier",
        "import torch\ntorch.distributed.broadcast(x, 0)",
        "from torch import distributed\ndistributed.new_group([0])",
        "import torch.distributed as dist\ndist.all_gather_object(x, y)",
        "group.allgather_into_tensor_coalesced(x, y)",
        "self.mesh.get_group().barrier()",
        "from torch.distributed._functional_collectives import all_gather_tensor",
    ],
)
def test_a_collective_is_found(text: str) -> None:
    assert offences(collectives, text, "shard/engine.py") == 1


def test_a_transports_own_methods_are_no_collectives() -> None:
    text = "transport.all_gather(x, y)\nself.transports[unit].reduce_scatter(x, y, z)\nimport torch.distributed"
    assert offences(collectives, text, "shard/engine.py") == 0


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ns = torch.cuda.Stream()",
        "import torch\ne = torch.cuda.Event(enable_timing=True)",
        "import torch\ns = torch.Stream()",
        "from torch.cuda import Event",
        "import torch.cuda as cuda\nmake = cuda.ExternalStream",
    ],
)
def test_a_stream_or_an_event_is_found(text: str) -> None:
    assert offences(streams_and_events, text, "shard/engine.py") == 1


def test_the_current_stream_and_our_own_events_are_no_new_ones() -> None:
    text = "import torch\nfrom yafsdp_like.memory.streams import Event\ns = torch.cuda.current_stream()"
    assert offences(streams_and_events, text, "shard/engine.py") == 0


def test_record_stream_is_found() -> None:
    assert offences(record_stream, "x.record_stream(s)", "memory/streams.py") == 1
    assert offences(record_stream, "a.b().record_stream(s)", "memory/streams.py") == 1


def test_a_module_without_a_docstring_is_found() -> None:
    assert offences(missing_docstring, "# a comment\nx = 1", "shard/unit.py") == 1
    assert offences(missing_docstring, '"""What it is for."""', "shard/unit.py") == 0


@pytest.mark.parametrize("path", ["utils.py", "shard/common.py", "helpers/x.py", "comm/nccl_utils.py"])
def test_a_name_that_fits_nowhere_is_found(path: str) -> None:
    assert offences(name_that_fits_nowhere, "", path) == 1
