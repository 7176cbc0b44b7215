"""Builds, runs and drops a network many times and prints what is left: `python ... CYCLES WARM_UP`.

Prints JSON: resident memory (bytes), descriptors, threads, child processes, handlers of the root
logger and of Lava's compiler, processes and variables that Lava still knows, after the warm-up and
at the end.
"""

# Not sorted: Lava is imported after its shim.
# ruff: isort: skip_file

import gc
import json
import logging
import sys
import threading

import numpy as np
import psutil

from hardware.lava_runtime import InProcessRuntime

from lava.magma.core.process.process import ProcessServer
from lava.magma.core.process.variable import VarServer
from lava.magma.core.run_conditions import RunSteps
from lava.magma.core.run_configs import Loihi2SimCfg
from lava.proc.dense.process import Dense
from lava.proc.lif.process import LIF
from lava.proc.monitor.process import Monitor

WEIGHTS = np.random.default_rng(0).integers(-20, 30, (256, 256))


def cycle() -> None:
    first = LIF(shape=(256,), vth=10, bias_mant=3, du=400, dv=300)
    second = LIF(shape=(256,), vth=10)
    dense = Dense(weights=WEIGHTS)
    first.s_out.connect(dense.s_in)
    dense.a_out.connect(second.a_in)
    monitor = Monitor()
    monitor.probe(second.s_out, 5)
    with InProcessRuntime(first, Loihi2SimCfg(select_tag="fixed_pt")) as runtime:
        runtime.run(RunSteps(5))
        monitor.get_data()


def standing() -> dict[str, int]:
    gc.collect()
    me = psutil.Process()
    return {
        "memory": me.memory_info().rss,
        "descriptors": me.num_fds(),
        "threads": threading.active_count(),
        "children": len(me.children()),
        "root handlers": len(logging.getLogger().handlers),
        "compiler handlers": len(logging.getLogger("lava.magma.compiler.compiler").handlers),
        "processes": len(ProcessServer().processes),
        "variables": len(VarServer().vars),
    }


if __name__ == "__main__":
    cycles, warm_up = int(sys.argv[1]), int(sys.argv[2])
    for _ in range(warm_up):
        cycle()
    before = standing()
    for _ in range(cycles - warm_up):
        cycle()
    print(json.dumps({"before": before, "after": standing()}))
