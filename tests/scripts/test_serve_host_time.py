"""What a step of serving costs the CPU: counts of calls, which are the same in every run of one Python, have bounds."""

import sys

import pytest

from bench.serve_host_time import SteadyTraffic, mean_counts

# With 32 rows that decode, and where a step mixes a prompt of 512 tokens beside them. Rows that use none of what a
# request may ask for beside tokens are to pay nothing for it. Lower the bounds when the counts fall.
BOUNDS = {False: {"package_calls": 575, "c_calls": 690}, True: {"package_calls": 2400, "c_calls": 2600}}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the bounds are those of Python 3.11")
def test_a_step_costs_no_more_calls_than_it_did() -> None:
    traffic = SteadyTraffic(num_rows=32)
    for mixed, bounds in BOUNDS.items():
        costs = mean_counts(traffic, mixed)
        more = {name: (getattr(costs, name), most) for name, most in bounds.items() if getattr(costs, name) > most}
        assert not more, f"{'mixed' if mixed else 'decoding'} steps: counts and their bounds: {more}"
