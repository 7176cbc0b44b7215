"""A pytest plugin (`-p lava_in_process_plugin`): `process.run` of Lava runs in this interpreter."""

import pytest

from hardware.lava_runtime import in_process


@pytest.fixture(autouse=True)
def _in_process():
    with in_process():
        yield
