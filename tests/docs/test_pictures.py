"""DESIGN's pictures are what the code does now; run this file as a program to print them.

python -m tests.docs.test_pictures
"""

from pathlib import Path

from tests.docs.pictures import address_map, streams_over_time
from tests.laws.recording import CHAIN_STEP

DESIGN = (Path(__file__).parents[2] / "DESIGN.md").read_text()
SLOTS = (("root",), ("a", "c"), ("b",))


def test_the_first_picture_shows_the_order_that_the_tests_of_order_demand() -> None:
    assert streams_over_time(CHAIN_STEP, SLOTS) in DESIGN


def test_the_second_picture_shows_the_layout_that_a_slot_has() -> None:
    assert address_map() in DESIGN


if __name__ == "__main__":
    print(streams_over_time(CHAIN_STEP, SLOTS), address_map(), sep="\n\n")
