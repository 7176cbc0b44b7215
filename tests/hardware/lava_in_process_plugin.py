"""A pytest plugin for Lava's own shipped tests: `process.run` runs in this interpreter.

`pytest -p lava_in_process_plugin PATH/site-packages/tests/lava/magma/runtime`
"""

import pytest

from hardware.lava_runtime import in_process

BACKGROUND = "RunContinuous: steps are taken in the background"
THREADS = "a second thread sends or receives while the network runs"
OWN_CHANNEL = "VarWire brings shared memory and a thread of its own"
COUNTS = "expects Lava's text with the number of exceptions, and no more of them"
CLASS = "expects an object of Lava's class Runtime"
RACE = "two ports of Lava's own, without any runtime; fails now and then on a busy machine"

CANNOT_APPLY = {
    "test_async_protocol.py::TestProcess::test_async_process_model": BACKGROUND,
    "test_async_protocol.py::TestProcess::test_async_process_model_pause": BACKGROUND,
    "test_context_manager.py::TestContextManager::test_context_manager_stops_process_continuous": (
        BACKGROUND
    ),
    "test_get_set_var.py::TestGetSetVar::test_get_set_variable_continous_mode": BACKGROUND,
    "test_run_continuously_and_pause.py::TestRunContinuous::test_run_continuous_sync": BACKGROUND,
    "test_run_continuously_and_pause.py::TestRunContinuous::test_run_continuous_sync_pause": (
        BACKGROUND
    ),
    "test_extractor.py::TestPyLoihiExtractorModel::test_run_continuous": BACKGROUND,
    "test_injector.py::TestPyLoihiInjectorModel::test_run_continuous": BACKGROUND,
    "test_extractor.py::TestPyLoihiExtractorModel::test_receive_data_receive_empty_blocking": (
        THREADS
    ),
    "test_extractor.py::TestPyLoihiExtractorModel::test_receive_data_send_full_blocking": THREADS,
    "test_extractor.py::TestPyLoihiExtractorModel::test_run_steps_blocking": THREADS,
    "test_injector.py::TestPyLoihiInjectorModel::test_run_steps_blocking": THREADS,
    "test_injector.py::TestPyLoihiInjectorModel::test_send_data_receive_empty_blocking": THREADS,
    "test_injector.py::TestPyLoihiInjectorModel::test_send_data_send_full_blocking": THREADS,
    "test_external_pipe_io.py::TestExternalPipeIO::test_run_steps_non_blocking": THREADS,
    "test_extractor.py::TestPyLoihiVarWireModel": OWN_CHANNEL,
    "test_exception_handling.py::TestExceptionHandling": COUNTS,
    "test_process.py::TestProcess::test_create_runtime": CLASS,
    "test_ports.py::TestPyPorts::test_py_in_port_probe": RACE,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in CANNOT_APPLY.items():
            if f"{name}::" in f"{item.nodeid}::":
                item.add_marker(pytest.mark.skip(reason=f"cannot apply: {reason}"))


@pytest.fixture(autouse=True)
def _in_process():
    with in_process():
        yield
