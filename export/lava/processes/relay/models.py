"""Model of the relay."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from export.lava.kernels import reshape
from export.lava.processes.relay.process import Relay
from export.lava.wire import from_wire, to_wire, wire_shape


@implements(proc=Relay, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyRelayModel(PyLoihiProcessModel):
    """A queue; before the first message arrives it holds zeros."""

    a_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    gate_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    a_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.shape, self.layout = proc_params["shape"], proc_params["layout"]
        self.shift, self.gated = proc_params["shift"], proc_params["gated"]
        empty = np.zeros(wire_shape(self.shape), np.int32)
        self.queue = deque([empty] * proc_params["delay"])

    def run_spk(self) -> None:
        self.queue.append(self.a_in.recv() << self.shift)
        value = self.queue.popleft()
        if self.gated:
            value = value * self.gate_in.recv()[:, None, None]
        if self.layout != "same":
            value = to_wire(reshape(from_wire(value, self.shape), self.layout))
        self.a_out.send(value)
