"""The shape of the package: who may import whom, which file alone may do what, sizes and names."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.laws.architecture import (
    LEVELS,
    PACKAGE,
    Check,
    allocations,
    collectives,
    cycle_of_parts,
    imports_upwards,
    missing_docstring,
    name_that_fits_nowhere,
    record_stream,
    sources,
    streams_and_events,
)

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
    for source in sources(PACKAGE):
        if source.part in parts:
            (allowed if excepted and source.path.startswith(excepted) else findings).extend(check(source))
    assert findings == []
    assert bool(allowed) == bool(excepted)


def test_parts_do_not_import_each_other_in_a_circle() -> None:
    assert cycle_of_parts(sources(PACKAGE)) == []


def test_every_folder_of_the_package_has_a_level() -> None:
    """Prevents: a new folder that no rule covers."""
    folders = {Path(source.path).parts[1] for source in sources(PACKAGE) if len(Path(source.path).parts) > 2}
    assert folders <= set(LEVELS)
