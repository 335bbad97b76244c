"""The tests marked `gpu`: what of the device an assertion can hold. One result a test."""

import os
from pathlib import Path

import pytest

from tests.gpu.part import Report
from tests.gpu.scale import Scale
from tests.gpu.tokens import ROOT

TESTS = ROOT / "tests" / "test_gpu_device.py"
DEVICE = "RECIPE_GPU_TESTS_DEVICE"  # `cpu`: the tests run there instead of being skipped


class Collector:
    """A plugin of pytest: puts each test's outcome as it comes."""

    def __init__(self, report: Report):
        self.report, self.outcomes = report, {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = str(report.longrepr).strip().splitlines()[-1][:300] if report.outcome == "failed" else None
            self.outcomes[report.nodeid.split("::")[-1]] = {"outcome": report.outcome, "reason": reason}
            self.report.put("tests", self.outcomes)


def run(scale: Scale, report: Report, folder: Path) -> None:
    os.environ[DEVICE] = scale.device
    collector = Collector(report)
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--basetemp={folder / 'pytest'}", str(TESTS)]
    code = pytest.main(options, plugins=[collector])
    if not collector.outcomes:
        raise RuntimeError(f"pytest ran no test (exit code {int(code)})")
    if failed := [name for name, test in collector.outcomes.items() if test["outcome"] == "failed"]:
        raise AssertionError(f"{len(failed)} of {len(collector.outcomes)} tests failed")
