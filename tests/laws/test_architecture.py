"""The shape of the package: who may import whom, which file alone may do what, sizes and names."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.laws.architecture import (
    LEVELS,
    PACKAGE,
    ROOMS,
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
    sources,
    streams_and_events,
    writes_of_others,
)

Paths = str | tuple[str, ...]
RULES: dict[Check, tuple[Iterable[str], Paths]] = {  # the parts that a check is for, and the paths that are excepted
    imports_upwards: (LEVELS, ""),
    allocations: (
        ("memory", "comm", "shard"),
        tuple(f"{PACKAGE}/memory/{name}.py" for name in ("allocator", "arena", "vmm")),
    ),
    collectives: (LEVELS, f"{PACKAGE}/comm/"),
    streams_and_events: (LEVELS, f"{PACKAGE}/memory/streams.py"),
    record_stream: (LEVELS, ""),
    missing_docstring: (LEVELS, ""),
    name_that_fits_nowhere: (LEVELS, ""),
    imports_upwards_inside: (ROOMS, ""),
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


CODE = (PACKAGE, "launch", "scripts")
EXCEPTIONS: dict[str, set[str]] = {}  # by check, the paths that still offend; one that does not any more must go


def offending_paths(name: str, findings: Iterable[str]) -> set[str]:
    """The paths of the findings that no exception allows."""
    return {finding.split(":")[0] for finding in findings} - EXCEPTIONS.get(name, set())


def unneeded_exceptions(name: str, findings: Iterable[str]) -> set[str]:
    """The exceptions that allow nothing any more."""
    return EXCEPTIONS.get(name, set()) - {finding.split(":")[0] for finding in findings}


def findings_of(name: str) -> list[str]:
    """What the check of that name finds, in tests or in all code."""
    if name == "long_test_file":
        return [finding for source in sources("tests") for finding in long_file(source)]
    if name in CHECKS_OF_ALL:
        return CHECKS_OF_ALL[name](sources(*CODE))
    check = {"long_file": long_file, "long_functions": long_functions, "old_words": old_words}[name]
    return [finding for source in sources(*CODE) for finding in check(source)]


CHECKS_OF_ALL: dict[str, Callable[[Iterable[Source]], list[str]]] = {
    "circles_of_modules": circles_of_modules,
    "classes_of_one_name": classes_of_one_name,
    "writes_of_others": writes_of_others,
}
CHECKS = ("long_file", "long_test_file", "long_functions", "old_words", *CHECKS_OF_ALL)


@pytest.mark.parametrize("name", CHECKS)
def test_the_repository_holds_no(name: str) -> None:
    findings = findings_of(name)
    assert not offending_paths(name, findings), findings
