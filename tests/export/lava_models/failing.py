"""Lava networks that go wrong, each in its own way; run in a watched child by `test_lava_watch`.

In a folder of its own: Lava executes every file beside the module that defines a process.
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.resources import CPU
from lava.magma.core.run_conditions import RunSteps
from lava.magma.core.run_configs import Loihi2SimCfg
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol
from lava.proc.dense.process import Dense
from lava.proc.lif.process import LIF

from export.errors import UnsupportedTargetError

STEPS = 50
FAULT_AT = 5


def note_time(stamp: str) -> None:
    """Say when the fault happens, so that the test sees how long it takes to be noticed."""
    Path(stamp).write_text(repr(time.time()))


class Fault(AbstractProcess):
    """Passes values on until it fails."""

    def __init__(self, *, fault: str, stamp: str, name: str) -> None:
        super().__init__(fault=fault, stamp=stamp, name=name)
        self.a_in = InPort(shape=(4,))
        self.a_out = OutPort(shape=(4,))


@implements(proc=Fault, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyFaultModel(PyLoihiProcessModel):
    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    a_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)

    def __init__(self, proc_params):
        super().__init__(proc_params)
        self.fault, self.stamp = proc_params["fault"], proc_params["stamp"]
        if self.fault == "init":
            note_time(self.stamp)
            raise ValueError("no such table")

    def run_spk(self):
        value = self.a_in.recv()
        if self.time_step == FAULT_AT:
            note_time(self.stamp)
            if self.fault == "raise":
                raise ValueError("table index 7 is out of range 0 to 6")
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "shape":
                value = value[:2]
            if self.fault == "hang":
                signal.pause()
        self.a_out.send(value)


def run_network(work: Path, stamp: str, fault: str) -> None:
    """LIF -> Dense -> Fault -> LIF; the last one waits for ever when the third one fails."""
    first = LIF(shape=(4,), bias_mant=1, vth=1, name="first")
    synapse = Dense(weights=np.eye(4, dtype=int), name="synapse")
    fault_process = Fault(fault=fault, stamp=stamp, name="middle")
    last = LIF(shape=(4,), name="last")
    first.s_out.connect(synapse.s_in)
    synapse.a_out.connect(fault_process.a_in)
    fault_process.a_out.connect(last.a_in)
    first.run(RunSteps(num_steps=STEPS), Loihi2SimCfg(select_tag="fixed_pt"))
    np.save(work / "voltage.npy", last.v.get())
    first.stop()


def die(work: Path, stamp: str) -> None:
    note_time(stamp)
    os.kill(os.getpid(), signal.SIGKILL)


def hang(work: Path, stamp: str) -> None:
    note_time(stamp)
    signal.pause()


def refuse(work: Path, stamp: str) -> None:
    note_time(stamp)
    raise UnsupportedTargetError("gate b1 looks back")


def note_progress(work: Path) -> None:
    (work / "progress").write_text("3\n")
    signal.pause()
