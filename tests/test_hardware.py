"""Rates of a machine: kept in a file, read back checked, and completed by published figures."""

import dataclasses
import json
from pathlib import Path

import pytest

from yafsdp_like import hardware
from yafsdp_like.hardware import (
    H200_MACHINE,
    MACHINE_VARIABLE,
    MachineRates,
    ProductRate,
    machine_rates,
    published_rates,
)

H200 = "NVIDIA H200"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(MACHINE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_is_saved_is_read_back(cache: Path) -> None:
    path = hardware.machine_path(H200, 2)
    assert path.is_relative_to(cache / "yafsdp" / "machine")
    measured = dataclasses.replace(H200_MACHINE, source="measured", memory_nbytes=4e12)
    measured.save(path)
    assert MachineRates.load(path) == machine_rates(H200, 2) == measured


def test_a_machine_that_nobody_has_measured_has_published_rates_and_says_so(cache: Path) -> None:
    assert machine_rates(H200, 2) is H200_MACHINE
    alone = machine_rates(H200)
    assert alone.num_ranks == 1 and (alone.unit_s or 0.0) < (H200_MACHINE.unit_s or 0.0), (
        "no other rank's memory is read"
    )
    other = machine_rates("NVIDIA A100-SXM4-80GB")
    assert other.product_flops == pytest.approx(312 / 989.4 * H200_MACHINE.product_flops)
    assert "only the peak of matrix products is known of NVIDIA A100" in other.source


def test_what_was_not_measured_is_published_and_the_source_names_both(cache: Path) -> None:
    MachineRates(H200, "measured here", memory_nbytes=4e12).save(hardware.machine_path(H200, 1))
    found = machine_rates(H200, 8)  # measured with one rank only
    assert (found.memory_nbytes, found.peer_nbytes) == (4e12, H200_MACHINE.peer_nbytes)
    assert found.source == f"measured here; where it has none, {H200_MACHINE.source}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"device": "x"}',
        '{"device": "x", "source": "y", "memory_nbytes": -1}',
        '{"device": "x", "source": "y", "memory_nbytes": "fast"}',
        '{"device": "x", "source": "y", "unknown": 1}',
        '{"device": "x", "source": "y", "products": [{"rows": 1}]}',
    ],
)
def test_a_file_that_holds_no_rates_is_refused_with_its_path(cache: Path, text: str) -> None:
    path = hardware.machine_path(H200)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"holds no measurements .* run python -m launch\.doctor") as error:
        machine_rates(H200)
    assert str(path) in str(error.value)


def test_a_file_that_is_named_and_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MACHINE_VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="there is no such file"):
        machine_rates(H200)


def test_of_several_ranks_the_slowest_rates_and_the_longest_times_count() -> None:
    one = MachineRates("x", "m", memory_nbytes=4.0, kernel_s=1.0, context_nbytes=5)
    two = MachineRates("x", "m", memory_nbytes=3.0, kernel_s=2.0, context_nbytes=6, peer_nbytes=7.0)
    assert one.slowest([one, two]) == dataclasses.replace(two)


def test_a_collective_takes_the_rate_of_the_nearest_size() -> None:
    assert H200_MACHINE.collective_nbytes("all_gather", 300 << 20) == 245e9
    assert H200_MACHINE.collective_nbytes("all_gather", 1) == 138e9
    assert H200_MACHINE.collective_nbytes("broadcast", 1) is None


def test_a_saved_file_is_json_that_people_can_read(cache: Path) -> None:
    path = hardware.machine_path(H200)
    published_rates(H200).save(path)
    assert json.loads(path.read_text())["collectives"][0]["name"] == "all_gather"


def test_small_products_take_longer_for_what_they_compute() -> None:
    published = dataclasses.replace(H200_MACHINE, product_flops=500e12, product_s=1e-5)
    assert published.product_seconds(500e12, 1000) == pytest.approx(1.01)
    rows = ProductRate(1024, 1024, 1024, 100e12), ProductRate(8192, 8192, 8192, 800e12)
    measured = dataclasses.replace(published, products=rows, kernel_s=1e-6)
    assert measured.product_seconds(2e12, 1000) == pytest.approx(0.02 + 1e-3), "2e9 each: the smaller one"
    assert measured.product_seconds(1e15, 1000) == pytest.approx(2.0 + 1e-3), "no faster than is sustained"
    assert MachineRates("x", "measured").product_seconds(1e12, 1) is None
