"""What a step of serving costs the CPU: counts of calls, which are the same in every run of one Python, have bounds."""

import sys

import pytest

from bench.serve_host_time import SteadyTraffic, main, mean_counts

# With 32 rows that decode, and where a step mixes a prompt of 512 tokens beside them. Rows that use none of what a
# request may ask for beside tokens are to pay nothing for it. Lower the bounds when the counts fall.
BOUNDS = {False: {"package_calls": 352, "c_calls": 949}, True: {"package_calls": 603, "c_calls": 1919}}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the bounds are those of Python 3.11")
def test_a_step_costs_no_more_calls_than_it_did() -> None:
    traffic = SteadyTraffic(num_rows=32)
    for mixed, bounds in BOUNDS.items():
        costs = mean_counts(traffic, mixed)
        more = {name: (getattr(costs, name), most) for name, most in bounds.items() if getattr(costs, name) > most}
        assert not more, f"{'mixed' if mixed else 'decoding'} steps: counts and their bounds: {more}"


def test_steps_of_both_kinds_are_counted_where_prompts_are_rare() -> None:
    """With one row a prompt comes every 128 steps: as many are looked at."""
    traffic = SteadyTraffic(num_rows=1)
    decoding, mixed = (mean_counts(traffic, is_mixed) for is_mixed in (False, True))
    assert not decoding.mixed and mixed.mixed and mixed.package_calls > decoding.package_calls > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--rows=0"], "--rows must be from 1 to 64"), (["--rows=1", "--steps=9"], "--steps must be at least 128")],
)
def test_traffic_that_lacks_steps_of_a_kind_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err
