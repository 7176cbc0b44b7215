"""The two grains of a segment; the run configuration chooses, as Lava does it."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.model.sub.model import AbstractSubProcessModel
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from export.lava.interpreter import Interpreter
from export.lava.layers import build_layers
from export.lava.partition import MAX_PORTS
from export.lava.processes.segment.process import Segment
from export.lava.wire import from_wire, to_wire


@implements(proc=Segment, protocol=LoihiProtocol)
@tag("fixed_pt", "layers")
class LayersModel(AbstractSubProcessModel):
    """One Lava process for each node, relay and probe."""

    def __init__(self, proc: AbstractProcess) -> None:
        part, recorders = proc.proc_params["part"], proc.proc_params["recorders"]
        for index, process in enumerate(build_layers(proc, part, recorders)):
            setattr(self, f"process{index}", process)


@implements(proc=Segment, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt", "blocks")
class BlocksModel(PyLoihiProcessModel):
    """One process model for the whole segment, in plain numpy integers."""

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.part = proc_params["part"]
        self.interpreter = Interpreter(self.part, proc_params["recorders"])

    def run_spk(self) -> None:
        arriving = [
            from_wire(getattr(self, f"in{index}").recv(), self.part.shapes[source])
            for index, source in enumerate(self.part.sources)
        ]
        for index, value in enumerate(self.interpreter.step(self.time_step, arriving)):
            getattr(self, f"out{index}").send(to_wire(np.asarray(value)))


for _index in range(MAX_PORTS):
    setattr(BlocksModel, f"in{_index}", LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24))
    setattr(BlocksModel, f"out{_index}", LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24))
