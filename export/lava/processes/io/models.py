"""Models of image source, probe and readout."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from export.lava.arrivals import ArrivalsModel
from export.lava.processes.io.process import ImageSource, Probe, Readout
from export.lava.wire import from_wire

PROGRESS_PERIOD = 0.2
"""Seconds between two notes of the current time step."""


@implements(proc=ImageSource, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyImageSourceModel(PyLoihiProcessModel):
    """Graded values, one message for each pixel and time step."""

    s_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.frames, self.steps = proc_params["frames"].astype(np.int32), proc_params["steps"]
        self.progress_path = proc_params["progress_path"]
        self.noted = 0.0

    def run_spk(self) -> None:
        image, step = divmod(self.time_step - 1, self.steps)
        if image < self.frames.shape[1]:
            self.s_out.send(self.frames[step % self.frames.shape[0], image])
        else:
            self.s_out.send(np.zeros(self.frames.shape[2:], np.int32))
        now = time.monotonic()
        if self.progress_path is not None and now - self.noted > PROGRESS_PERIOD:
            self.noted = now
            self.progress_path.write_text(f"{self.time_step}\n")


@implements(proc=Probe, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyProbeModel(PyLoihiProcessModel):
    """Packs and appends; Lava's own Monitor would move every element by itself."""

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.recorders = proc_params["recorders"]

    def run_spk(self) -> None:
        for index, recorder in enumerate(self.recorders):
            value = getattr(self, f"s_in{index}").recv()
            recorder.record(self.time_step, from_wire(value, recorder.shape))


for _index in range(Probe.WIDTH):
    setattr(PyProbeModel, f"s_in{_index}", LavaPyType(PyInPort.VEC_DENSE, np.int64, precision=64))


@implements(proc=Readout, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyReadoutModel(ArrivalsModel):
    """Integer sums; the division by the scale is left to the reader."""

    x_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int64, precision=32)
    size_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int64, precision=16)
    a_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int64, precision=64)
    weight: Any = LavaPyType(np.ndarray, np.int64, precision=32)
    bias: Any = LavaPyType(np.ndarray, np.int64, precision=64)
    total: Any = LavaPyType(np.ndarray, np.int64, precision=64)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.steps, self.depth = proc_params["steps"], proc_params["depth"]

    def run_spk(self) -> None:
        values = self.take("x_in").reshape(-1, self.total.size)
        values = values * self.take_or("size_in", np.ones(len(values), np.int64))[:, None]
        step = (self.time_step - 1 - self.depth) % self.steps
        if step == 0:
            self.total[:] = 0
        self.total += values.sum(axis=0)
        last = step == self.steps - 1
        self.a_out.send(self.weight @ self.total + self.bias if last else np.zeros_like(self.bias))
