"""What holds for every test: one thread per worker, fixed seeds, and one-line reasons for skips."""

import os

# Two workers with two threads each are slower on two cores than two with one. Set before anything
# imports torch, numpy or numba; child interpreters inherit it.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import importlib.util  # noqa: E402  (after the environment is set)
import random  # noqa: E402
import sys  # noqa: E402
from collections import Counter  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from _pytest.terminal import TerminalReporter  # noqa: E402  (pytest 8 exports it by name)
from hypothesis import HealthCheck, settings  # noqa: E402

SEED = 20_240_822

# Same examples in every run; no deadline, since the first call of a test compiles or imports.
settings.register_profile(
    "atsnn",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("atsnn")


def _has_lava() -> bool:
    # find_spec rather than an import: on Python 3.11 and 3.12 Lava imports only behind our shim.
    return all(importlib.util.find_spec(name) is not None for name in ("lava", "asteval"))


def _has_gpu() -> bool:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount() > 0
    except Exception:  # no package, no driver, no device: all mean the same here
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs = (
        ("lava", _has_lava, "Lava is not installed: make PYTHON=python3.10 test"),
        ("gpu", _has_gpu, "no NVIDIA GPU with NVML here"),
    )
    for marker, is_here, reason in needs:
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_here():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """One line for each reason to skip, however many tests share it."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(r.longrepr[2] if isinstance(r.longrepr, tuple) else "" for r in reports)
    for reason, count in reasons.most_common():
        plural = "test" if count == 1 else "tests"
        terminalreporter.write_line(f"{count} {plural} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  (for third-party code that uses the global generator)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(SEED)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator of the test's own."""
    return np.random.default_rng(SEED)
