"""Models of relay and sum."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from export.lava.arrivals import ArrivalsModel
from export.lava.kernels import reshape
from export.lava.processes.relay.process import Relay, Sum
from export.lava.wire import from_wire, to_wire


@implements(proc=Relay, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyRelayModel(ArrivalsModel):
    """Holds back what must wait or belongs to a halted token."""

    a_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    gate_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    a_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.shape, self.layout = proc_params["shape"], proc_params["layout"]

    def run_spk(self) -> None:
        value = self.take("a_in")
        if "gate_in" in self.delays:
            value = value * self.take("gate_in")[:, None, None]
        if self.layout != "same":
            value = to_wire(reshape(from_wire(value, self.shape), self.layout))
        self.a_out.send(value)


@implements(proc=Sum, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PySumModel(ArrivalsModel):
    """An in-port for each term, since Lava's in-ports neither wait nor shift."""

    a_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.shifts = proc_params["shifts"]

    def run_spk(self) -> None:
        terms = [self.take(f"a_in{i}") << shift for i, shift in enumerate(self.shifts)]
        self.a_out.send(np.sum(terms, axis=0, dtype=np.int32))


for _index in range(Sum.WIDTH):
    setattr(PySumModel, f"a_in{_index}", LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24))
