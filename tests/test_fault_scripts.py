"""A few of the scripts of `tests.benchmarks.fault_network` and `fault_disk`."""

import pytest

from tests.benchmarks.fault_disk import disk_faults
from tests.benchmarks.fault_network import network_faults


@pytest.mark.parametrize(
    "run_scripts",
    [
        lambda: network_faults(("503",)),
        lambda: disk_faults(("full, for two saves", "half of the optimizer from step 10 on")),
    ],
)
def test_nothing_is_lost_and_the_end_is_the_same(run_scripts):
    for result in run_scripts():
        assert result["survived"] and result["bit_equal"], result
        assert (result["steps_lost"], result["rows_lost"], result["rows_repeated"]) == (0, 0, 0), result
        assert result["warnings"] or result["exit_code"] == 4, result  # never silent
