"""Models of gated LIF and pooled neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from export.lava.arrivals import ArrivalsModel
from export.lava.kernels import neurons, or_pool
from export.lava.processes.neuron.process import GatedLIF, OrPool
from export.lava.wire import map_from_wire, to_wire


@implements(proc=GatedLIF, protocol=LoihiProtocol)
@requires(CPU)
@tag("bit_accurate_loihi", "fixed_pt")
class PyGatedLIFModel(ArrivalsModel):
    """The arithmetic of Lava's bit-accurate LIF, with a gate."""

    a_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    gate_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    s_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)
    u: Any = LavaPyType(np.ndarray, np.int32, precision=24)
    v: Any = LavaPyType(np.ndarray, np.int32, precision=24)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.constants = proc_params["constants"]
        self.interval = proc_params["reset_interval"]
        self.offset = proc_params["reset_offset"] % self.interval

    def run_spk(self) -> None:
        activation = self.take("a_in")
        gate = self.take("gate_in")[:, None, None] if "gate_in" in self.delays else None
        if self.time_step % self.interval == self.offset:
            self.u[:] = 0
            self.v[:] = 0
        bias = self.constants.bias
        self.s_out.send(neurons(self.u, self.v, activation, self.constants, bias, gate))


@implements(proc=OrPool, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyOrPoolModel(ArrivalsModel):
    """Sends the previous step's result first, as Lava's synapses do."""

    s_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    s_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)
    s_buf: Any = LavaPyType(np.ndarray, np.int32, precision=24)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.window = (proc_params["kernel"], proc_params["stride"], proc_params["padding"])

    def run_spk(self) -> None:
        self.s_out.send(self.s_buf)
        self.s_buf[:] = to_wire(or_pool(map_from_wire(self.take("s_in")), *self.window))
