"""Checks of the package's source: who may import whom, which file alone may do what, sizes and names.

Every check is a function from source to findings; `test_architecture_checks.py` has an offence that each of them finds.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "yafsdp_like"


@dataclass(frozen=True)
class Source:
    """One module of the repository: its path from the root, its text, and what its names stand for."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return parsed(self.text)

    @property
    def part(self) -> str:
        """The folder of the package that the module is in; "" for the package's own `__init__`."""
        return part_of(self.path.removesuffix(".py").replace("/", "."))

    @property
    def module(self) -> str:
        """Its dotted name, as it is imported; scripts are imported from their own folder."""
        return self.path.removesuffix(".py").removesuffix("/__init__").removeprefix("scripts/").replace("/", ".")

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


def sources(*folders: str) -> list[Source]:
    """Every module below `folders`."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


Check = Callable[[Source], list[str]]

# --- imports go one way ---

LEVELS = {  # a part imports from parts below it; parts of one level, as long as there is no cycle, from each other
    "hardware": 0,
    "memory": 0,
    "kernels": 0,
    "ops": 1,
    "comm": 1,
    "models": 2,
    "shard": 2,
    "optim": 2,
    "checkpoint": 2,
    "data": 2,
    "migrate": 2,
    "inference": 3,
    "": 4,  # the package's own __init__, which re-exports
}
ALONE = {"hardware", "memory", "kernels"}  # import nothing of the package but themselves
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


ROOMS = {  # inside a part, a folder imports from those before it; "" is what is in none, and `__init__` comes last
    "shard": ("spec", "runtime", "forecast", ""),
    "inference": ("kv", "", "fleet", "plan", "weights", "engine", "pool", "text", "http"),
}


def imports_upwards_inside(source: Source) -> list[str]:
    """Imports of a later folder of the same part by an earlier one."""
    if source.part not in ROOMS:
        return []
    own = room_level(source.module)
    return [
        f"{source.where(node)}: {source.module} imports {full}"
        for node, _, full in source.imports()
        if part_of(full) == source.part and room_level(full) > own
    ]


def room_level(name: str) -> int:
    """Where in `ROOMS` a module is, or what is imported from it; classes are imported from `__init__`, modules not."""
    part, room = [*name.split("."), "", ""][1:3]
    rooms = ROOMS[part]
    is_init = not room or (room[0].isupper() and name.count(".") == 2)
    return len(rooms) if is_init else rooms.index(room if room in rooms else "")


def circles_of_modules(modules: Iterable[Source]) -> list[str]:
    """Modules that import each other in a circle, one finding for each that is on one; imports for types count."""
    known = {source.module: source for source in modules}
    targets = {name: {home_of(full, known) for _, _, full in source.imports()} for name, source in known.items()}
    reached = {name: reachable(name, targets) for name in known}
    return [
        f"{source.path}: imports {sorted(t for t in targets[name] if name in reached.get(t, ()))}, which import it"
        for name, source in known.items()
        if name in reached[name]
    ]


def home_of(full: str, known: Mapping[str, Source]) -> str:
    """The module of the repository that a dotted name is in; "" if none."""
    while full and full not in known:
        full = full.rpartition(".")[0]
    return full


def reachable(start: str, targets: Mapping[str, set[str]]) -> set[str]:
    """All modules that `start` imports, or what it imports does."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = targets.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


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
    r"|UntypedStorage|(\w+\.)*(?!DTensor$)\w*Tensor|(\w+\.)*\w*Storage)"
    r"|.*\.new_(empty|zeros|ones|full|tensor|empty_strided)"
)
COLLECTIVES = re.compile(
    r"(?!yafsdp_like\.)(?:torch\.distributed\.(all_gather|all_reduce|all_to_all|reduce|reduce_scatter|scatter|gather|broadcast|send|recv"
    r"|isend|irecv|batch_isend_irecv|barrier|monitored_barrier|new_group|new_subgroups)\w*"
    r"|torch\.distributed\._functional_collectives.*"
    r"|.*\.(allgather|allreduce|alltoall|_allgather|_reduce_scatter|reduce_scatter_|all_gather_)\w*"
    r"|.*\.(?!stream_barrier$)\w*(_coalesced|barrier))"  # that one is a transport's
)
STREAMS = re.compile(r"torch(\.\w+)*\.(Stream|ExternalStream|Event)")


def allocations(source: Source) -> list[str]:
    """Calls that make a tensor with memory of its own; `device="meta"` makes one without, and so does `DTensor`."""
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


SHARD_STATE = "yafsdp_like/shard/runtime/"
WRITERS = {  # classes whose attributes are written in their own module alone, which has verbs for it
    f"{SHARD_STATE}freshness.py": ("Freshness",),
    f"{SHARD_STATE}param.py": ("ShardedParam",),
    f"{SHARD_STATE}slots.py": ("_Slot", "GatherSlot", "GradientSlot"),
    f"{SHARD_STATE}unit_state.py": ("Unit",),
}
OTHER_OBJECTS = {  # "path: attribute" of objects that only share the name
    "yafsdp_like/shard/api.py: state",
    "yafsdp_like/shard/api.py: unit",
    "yafsdp_like/shard/fsdp_module.py: unit",
    "yafsdp_like/shard/runtime/watching.py: name",
}
MUTATORS = "add append clear difference_update discard extend insert pop popitem remove reverse setdefault sort update"


def writes_of_others(modules: Iterable[Source]) -> list[str]:
    """Writes to an attribute of the classes in `WRITERS` by another module of `shard`: assigned, deleted, or changed.

    By the attribute's name: what an object is, is not known. `self` is an object of the module's own.
    """
    modules = list(modules)
    homes: dict[str, set[str]] = {}
    for source in modules:
        for cls in source.tree.body:
            if isinstance(cls, ast.ClassDef) and cls.name in WRITERS.get(source.path, ()):
                for node in ast.walk(cls):
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                        homes.setdefault(node.attr, set()).add(source.path)
    return [
        f"{source.where(node)}: writes {node.attr} of {', '.join(sorted(homes[node.attr]))}"
        for source in modules
        if source.part == "shard"
        for node in written_attributes(source.tree)
        if source.path not in homes.get(node.attr, {source.path}) and f"{source.path}: {node.attr}" not in OTHER_OBJECTS
    ]


def written_attributes(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Attributes of objects other than `self` that are assigned or deleted, or whose values are changed in place."""
    for node in ast.walk(tree):
        written: ast.AST | None = None
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            written = node
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            written = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS.split():
            written = node.func.value
        if isinstance(written, ast.Attribute) and not is_self(written.value):
            yield written


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


# --- names and words ---


def missing_docstring(source: Source) -> list[str]:
    return [] if ast.get_docstring(source.tree) else [f"{source.path}: says nothing of what it is for"]


def name_that_fits_nowhere(source: Source) -> list[str]:
    fits_nowhere = re.search(r"(^|[/_])(utils?|common|helpers?|misc)(\.py|/)", source.path)
    return [f"{source.path}: a name that fits nowhere is a design question"] if fits_nowhere else []


# One word, one meaning: what the field has a word for is called by that word. On the left are old names: "Name" of a
# class, "name()" of a function or method, "name.py" of a module, "NAME_*" of constants that start so, "*name*" as a
# word within any name.
OLD_WORDS = {
    "meet()": "stream_barrier",
    "expect()": "arm_watchdog",
    "agree()": "check_same_on_all_ranks",
    "share()": "all_gather_object",
    "together()": "raise_on_all_ranks",
    "together.py": "tp_driver.py",
    "gather()": "all_gather",
    "*team*": "TPGroup",
    "*leader*": "TPDriver",
    "*family*": "UnitTree",
    "*blueprint*": "memory_layout",
    "*building*": "AllocatedMemory",
    "rest()": "release but keep",
    "IDLE": "STALE",
    "bring()": "prefetch",
    "moved()": "non_resident",
    "windows.py": "vmm.py",
    "shown()": "aliased",
    "shows()": "aliases",
    "spares_own_chunks()": "aliases_shards",
    "images.py": "packed_weights.py",
    "tables.py": "kv_cache.py",
    "Context": "KVSequence",
    "staging.py": "batch_inputs.py",
    "product.py": "gemv.py",
    "fed()": "token_pool",
    "starts()": "cu_seqlens_q",
    "lengths()": "seq_lens",
    "Front": "OpenAIHandler",
    "Gate": "AuthMiddleware",
    "Numbers": "ServerMetrics",
    "Form": "ResponseFormat",
    "facts()": "metadata",
    "behind()": "asynchronous",
    "MOST_*": "MAX_",
    "LEAST_*": "MIN_",
    "LONGEST_*": "MAX_",
    "agreed()": "an imperative verb",
    "filled()": "an imperative verb",
    "placed()": "an imperative verb",
    "Sequence": "a name that typing does not have",
    "State": "what it is the state of",
    "Event": "what it is an event of",
}
OTHER_MEANINGS: set[str] = set()  # "path: name" that mean something else, for which the field has no other word


def old_words(source: Source) -> list[str]:
    """Public names (module, classes, functions, methods, constants) that are in `OLD_WORDS`."""
    named = [(source.tree, source.module.rpartition(".")[2] + ".py"), *defined(source.tree)]
    return [
        f"{source.where(node)}: {name}, which the field calls {better}"
        for node, name in named
        for old, better in OLD_WORDS.items()
        if is_called(name, old) and f"{source.path}: {name}" not in OTHER_MEANINGS
    ]


def defined(scope: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The public names that are defined at the top of a module and of its classes, written as in `OLD_WORDS`."""
    for node in getattr(scope, "body", ()):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node, node.name
            yield from defined(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield node, f"{node.name}()"
        elif isinstance(node, ast.Assign):
            yield from ((node, t.id) for t in node.targets if isinstance(t, ast.Name) and t.id.isupper())


def is_called(name: str, old: str) -> bool:
    """Whether a name is what a key of `OLD_WORDS` says."""
    if old.startswith("*"):
        words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", name)
        return old.strip("*") in [word.lower() for word in words]
    return name.startswith(old[:-1]) if old.endswith("*") else name == old


def classes_of_one_name(modules: Iterable[Source]) -> list[str]:
    """Public classes whose name another public class has too: a reader who searches for one finds the other."""
    homes: dict[str, list[str]] = {}
    for source in modules:
        for node, name in defined(source.tree):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(name, []).append(source.path)
    return [f"{', '.join(paths)}: {name}" for name, paths in homes.items() if len(paths) > 1]


# --- sizes ---

MAX_FILE_LINES = 450
MAX_TEST_FILE_LINES = 600
MAX_FUNCTION_LINES = 60  # docstring included


def long_file(source: Source) -> list[str]:
    limit = MAX_TEST_FILE_LINES if source.path.startswith("tests/") else MAX_FILE_LINES
    num_lines = len(source.text.splitlines())
    return [f"{source.path}: {num_lines} lines, expected at most {limit}"] if num_lines > limit else []


def long_functions(source: Source) -> list[str]:
    functions = (n for n in ast.walk(source.tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return [
        f"{source.where(f)}: {f.name} has {num_lines} lines, expected at most {MAX_FUNCTION_LINES}"
        for f in functions
        if (num_lines := (f.end_lineno or f.lineno) - f.lineno + 1) > MAX_FUNCTION_LINES
    ]
