"""Each check of the architecture finds an offence, and not what only looks like one."""

import pytest

from tests.laws.architecture import (
    PACKAGE,
    Check,
    Source,
    allocations,
    circles_of_modules,
    classes_of_one_name,
    collectives,
    cycle_of_parts,
    imports_upwards,
    imports_upwards_inside,
    long_file,
    long_functions,
    missing_docstring,
    name_that_fits_nowhere,
    old_words,
    record_stream,
    streams_and_events,
    writes_of_others,
)
from tests.laws.test_architecture import CHECKS, EXCEPTIONS, findings_of, offending_paths, unneeded_exceptions


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
    text += "\nfrom torch.distributed.tensor import DTensor\nDTensor(y, spec, requires_grad=False)"
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


SLOTS = """
class GatherSlot:
    def __init__(self):
        self.state, self.neighbours = 0, []

    def hold(self):
        self.state = 1

def find_neighbours(slots):
    slots[0].neighbours = slots
"""


@pytest.mark.parametrize(
    "text",
    [
        "slot.state = HELD",
        "unit.gather_slot.state, x = HELD, 1",
        "use.slot.state |= 1",
        "def f(self): self.slot.state = HELD",
        "del slot.neighbours",
        "slot.neighbours[0] = other",
        "slot.neighbours.append(other)",
        "for slot.state in states: pass",
    ],
)
def test_a_write_to_another_modules_object_is_found(text: str) -> None:
    own = Source(f"{PACKAGE}/shard/runtime/slots.py", SLOTS)
    assert writes_of_others([own, Source(f"{PACKAGE}/shard/hooks.py", text)]) == [
        f"{PACKAGE}/shard/hooks.py:1: writes {'neighbours' if 'neighbours' in text else 'state'} of {own.path}"
    ]


def test_reading_calling_and_writing_ones_own_are_no_such_write() -> None:
    own = Source(f"{PACKAGE}/shard/runtime/slots.py", SLOTS)
    text = "class A:\n    def f(self, slot):\n        self.state = slot.state\n        slot.hold()\n        x.other = 1"
    assert writes_of_others([own, Source(f"{PACKAGE}/shard/hooks.py", text)]) == []


def test_a_module_without_a_docstring_is_found() -> None:
    assert offences(missing_docstring, "# a comment\nx = 1", "shard/unit.py") == 1
    assert offences(missing_docstring, '"""What it is for."""', "shard/unit.py") == 0


@pytest.mark.parametrize("path", ["utils.py", "shard/common.py", "helpers/x.py", "comm/nccl_utils.py"])
def test_a_name_that_fits_nowhere_is_found(path: str) -> None:
    assert offences(name_that_fits_nowhere, "", path) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("inference/kv/pages.py", "from yafsdp_like.inference.engine.request import Request"),
        ("inference/engine/engine.py", "if TYPE_CHECKING:\n    from yafsdp_like.inference.http.server import Server"),
        ("inference/text/chat.py", "from ..http import errors"),
        ("inference/weights/store.py", "from yafsdp_like.inference import Engine"),
        ("shard/spec/param.py", "def f():\n    from yafsdp_like.shard.runtime.slots import Slot"),
        ("shard/spec/param.py", "from yafsdp_like.shard.api import fully_shard"),
        ("shard/runtime/params.py", "from yafsdp_like.shard import hooks"),
    ],
)
def test_an_import_that_goes_up_inside_a_part_is_found(path: str, text: str) -> None:
    assert offences(imports_upwards_inside, text, path) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("inference/http/server.py", "from yafsdp_like.inference.kv.pages import Page\nfrom . import errors"),
        ("inference/__init__.py", "from yafsdp_like.inference.http.server import Server"),
        ("shard/api.py", "from yafsdp_like.shard.runtime.slots import Slot\nfrom yafsdp_like.shard import hooks"),
        ("shard/runtime/params.py", "from yafsdp_like.shard.spec import param\nfrom yafsdp_like.memory import plan"),
    ],
)
def test_an_import_that_goes_down_inside_a_part_is_not(path: str, text: str) -> None:
    assert offences(imports_upwards_inside, text, path) == 0


def test_a_circle_of_modules_is_found_where_only_types_close_it() -> None:
    texts = {
        "shard/a.py": "from yafsdp_like.shard import b",
        "shard/b.py": "def f():\n    from .c import C",
        "shard/c.py": "if TYPE_CHECKING:\n    from yafsdp_like.shard.a import A",
        "shard/d.py": "from yafsdp_like.shard.a import A",
    }
    circle = [Source(f"{PACKAGE}/{path}", text) for path, text in texts.items()]
    found = circles_of_modules(circle)
    assert [finding.split(":")[0] for finding in found] == [f"{PACKAGE}/shard/{name}.py" for name in "abc"]
    assert circles_of_modules(circle[1:]) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("comm/windows.py", ""),
        ("comm/x.py", "class Team: ..."),
        ("comm/x.py", "class TheTeamOfRanks: ..."),
        ("comm/x.py", "async def agree(x): ..."),
        ("comm/x.py", "class Transport:\n    def meet(self): ..."),
        ("comm/x.py", "MOST_BYTES = 3"),
        ("comm/x.py", "class Limits:\n    LEAST_ROOM = 3"),
    ],
)
def test_an_old_word_is_found(path: str, text: str) -> None:
    assert offences(old_words, text, path) == 1


def test_private_names_and_words_inside_of_others_are_no_old_words() -> None:
    text = "def _meet(): ...\nclass _Team:\n    def agree(self): ...\ndef all_gather(): ...\ndef meeting_place(): ..."
    assert offences(old_words, text, "comm/x.py") == 0
    assert offences(old_words, "class UnitState: ...\ndef context(): ...\nMOST = 3", "comm/product_of.py") == 0


def test_two_classes_of_one_name_are_found() -> None:
    modules = [Source(f"{PACKAGE}/{name}.py", f"class State: ...\nclass {name}: ...\nclass _S: ...") for name in "AB"]
    assert classes_of_one_name(modules) == [f"{PACKAGE}/A.py, {PACKAGE}/B.py: State"]


def test_a_long_file_is_found() -> None:
    assert offences(long_file, "x = 1\n" * 451, "comm/x.py") == 1
    assert offences(long_file, "x = 1\n" * 450, "comm/x.py") == 0
    assert len(long_file(Source("tests/test_x.py", "x = 1\n" * 601))) == 1
    assert long_file(Source("tests/test_x.py", "x = 1\n" * 600)) == []


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_long_function_is_found_wherever_it_is(kind: str) -> None:
    lines = ["class A:", f"    {kind} f(self):", *["        x = 1"] * 60]
    assert offences(long_functions, "\n".join(lines), "comm/x.py") == 1
    assert offences(long_functions, "\n".join(lines[:-1]), "comm/x.py") == 0


@pytest.mark.parametrize("name", CHECKS)
def test_every_exception_is_needed(name: str) -> None:
    """Prevents: a list of exceptions that outlives what it excuses."""
    assert not unneeded_exceptions(name, findings_of(name)), "remove these from EXCEPTIONS"


def test_an_exception_that_is_no_longer_needed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXCEPTIONS, "check", {"a.py", "b.py"})
    findings = ["a.py:3: something", "a.py:4: something", "c.py: something"]
    assert offending_paths("check", findings) == {"c.py"}
    assert unneeded_exceptions("check", findings) == {"b.py"}
