"""Processes of the tests of the Lava runtime, and their models.

In a folder of their own: Lava executes every file beside the module that defines a process.
"""

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyAsyncProcessModel, PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort, PyRefPort, PyVarPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.model.sub.model import AbstractSubProcessModel
from lava.magma.core.process.ports.ports import InPort, OutPort, RefPort, VarPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.process.variable import Var
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.async_protocol import AsyncProtocol
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol
from lava.proc.dense.process import Dense
from lava.proc.lif.process import LIF
from scipy.sparse import csr_matrix


class Counter(AbstractProcess):
    """Adds its step number to `v` in the spiking phase and doubles it in post-management."""

    def __init__(self, shape=(3,), **parameters):
        super().__init__(shape=shape, **parameters)
        self.v = Var(shape=shape, init=1)
        self.v_port = VarPort(self.v)
        self.s_out = OutPort(shape=shape)


@implements(proc=Counter, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt", "fixed_pt")
class CounterModel(PyLoihiProcessModel):
    v: np.ndarray = LavaPyType(np.ndarray, np.int64)
    v_port: PyVarPort = LavaPyType(PyVarPort.VEC_DENSE, np.int64)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int64)

    def run_spk(self):
        self.v = self.v + self.time_step
        self.s_out.send(self.v)

    def post_guard(self):
        return self.time_step % 2 == 0

    def run_post_mgmt(self):
        self.v = self.v * 2


class Reader(AbstractProcess):
    """Reads a variable in post-management, and writes it back plus one at every third step."""

    def __init__(self, shape=(3,), writes=True):
        super().__init__(writes=writes)
        self.ref = RefPort(shape=shape)
        self.seen = Var(shape=(40, *shape), init=0)


@implements(proc=Reader, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt", "fixed_pt")
class ReaderModel(PyLoihiProcessModel):
    ref: PyRefPort = LavaPyType(PyRefPort.VEC_DENSE, np.int64)
    seen: np.ndarray = LavaPyType(np.ndarray, np.int64)

    def post_guard(self):
        return True

    def run_post_mgmt(self):
        value = self.ref.read()
        self.seen[self.time_step - 1] = value
        if self.proc_params["writes"] and self.time_step % 3 == 0:
            self.ref.write(value + 1)
            self.ref.wait()


class Phases(AbstractProcess):
    """Keeps the order of its phases; `learns`, `prepares` and `reports` are the guards' periods."""

    def __init__(self, learns=0, prepares=0, reports=0, **parameters):
        super().__init__(learns=learns, prepares=prepares, reports=reports, **parameters)
        self.log = Var(shape=(400,), init=0)
        self.s_in = InPort(shape=(1,))
        self.s_out = OutPort(shape=(1,))


@implements(proc=Phases, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt", "fixed_pt")
class PhasesModel(PyLoihiProcessModel):
    log: np.ndarray = LavaPyType(np.ndarray, np.int64)
    s_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, int)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, int)

    def _note(self, phase):
        self.log[np.argmin(self.log)] = 10 * self.time_step + phase
        if self.proc_params.get("pauses") == (self.time_step, phase):
            self._req_pause = True
        if self.proc_params.get("stops") == (self.time_step, phase):
            self._req_stop = True

    def _due(self, name):
        period = self.proc_params[name]
        return bool(period) and self.time_step % period == 0

    def run_spk(self):
        self._note(1)
        self.s_out.send(np.ones(1))
        self.s_in.recv()

    def pre_guard(self):
        return self._due("prepares")

    def run_pre_mgmt(self):
        self._note(2)

    def lrn_guard(self):
        return self._due("learns")

    def run_lrn(self):
        self._note(3)

    def post_guard(self):
        return self._due("reports")

    def run_post_mgmt(self):
        self._note(4)


class Layer(AbstractProcess):
    """A synapse and its neurons, as one process; `v` is the neurons'."""

    def __init__(self, weights):
        super().__init__(weights=weights)
        self.s_in = InPort(shape=(weights.shape[1],))
        self.s_out = OutPort(shape=(weights.shape[0],))
        self.v = Var(shape=(weights.shape[0],), init=0)


@implements(proc=Layer, protocol=LoihiProtocol)
class LayerModel(AbstractSubProcessModel):
    def __init__(self, proc):
        weights = proc.proc_params["weights"]
        self.dense = Dense(weights=weights)
        self.lif = LIF(shape=(weights.shape[0],), vth=40, du=500, dv=200, bias_mant=3)
        proc.in_ports.s_in.connect(self.dense.s_in)
        self.dense.a_out.connect(self.lif.a_in)
        self.lif.s_out.connect(proc.out_ports.s_out)
        proc.vars.v.alias(self.lif.vars.v)


class Values(AbstractProcess):
    """A variable of each type that a model can have."""

    def __init__(self, **parameters):
        super().__init__(**parameters)
        self.matrix = Var(shape=(2, 3), init=np.arange(6).reshape(2, 3))
        self.whole = Var(shape=(1,), init=7)
        self.text = Var(shape=(5,), init="abcde")
        self.sparse = Var(shape=(2, 2), init=csr_matrix(np.array([[0, 2], [3, 0]])))
        self.s_in = InPort(shape=(3,))


@implements(proc=Values, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt", "fixed_pt")
class ValuesModel(PyLoihiProcessModel):
    matrix: np.ndarray = LavaPyType(np.ndarray, np.int64)
    whole: int = LavaPyType(int, int)
    text: str = LavaPyType(str, str)
    sparse: csr_matrix = LavaPyType(csr_matrix, np.int64)
    s_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int64)

    def __init__(self, proc_params):
        super().__init__(proc_params)
        self.updates = 0

    def on_var_update(self):
        self.updates += 1

    def run_spk(self):
        self.s_in.recv()
        table = self.proc_params.get("table")
        if table is not None:
            table += 1


class Relay(AbstractProcess):
    """Passes on what it receives; `fails` names what it does wrong, at which step."""

    def __init__(self, fails="", at=1, times=1, **parameters):
        super().__init__(fails=fails, at=at, times=times, **parameters)
        self.s_in = InPort(shape=(3,))
        self.s_out = OutPort(shape=(3,))


@implements(proc=Relay, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt", "fixed_pt")
class RelayModel(PyLoihiProcessModel):
    s_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int64)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int64)

    def __init__(self, proc_params):
        super().__init__(proc_params)
        if proc_params["fails"] == "construction":
            raise ZeroDivisionError("no model today")

    def _fails(self, how):
        return self.proc_params["fails"] == how and self.time_step == self.proc_params["at"]

    def run_spk(self):
        value = self.s_in.recv()
        if self._fails("value"):
            raise KeyError("a wrong key")
        if self._fails("interrupt"):
            raise KeyboardInterrupt
        if self._fails("silence"):
            return
        for _ in range(self.proc_params["times"]):
            self.s_out.send(value[:2] if self._fails("shape") else value)

    def post_guard(self):
        return self._fails("management")

    def run_post_mgmt(self):
        raise OSError("no disk")


class Mutual(AbstractProcess):
    """Two of them read each other's `v` in the same phase."""

    def __init__(self, phase="post", **parameters):
        super().__init__(phase=phase, **parameters)
        self.v = Var(shape=(1,), init=0)
        self.ref = RefPort(shape=(1,))


@implements(proc=Mutual, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt", "fixed_pt")
class MutualModel(PyLoihiProcessModel):
    v: np.ndarray = LavaPyType(np.ndarray, np.int64)
    ref: PyRefPort = LavaPyType(PyRefPort.VEC_DENSE, np.int64)

    def run_spk(self):
        if self.proc_params["phase"] == "spiking":
            self.ref.read()
        if self.proc_params["phase"] == "written":
            self.ref.write(np.array([self.time_step]))

    def post_guard(self):
        return self.proc_params["phase"] == "post"

    def run_post_mgmt(self):
        self.ref.read()


class Free(AbstractProcess):
    """Asynchronous: sends as many numbers as it is told steps."""

    def __init__(self, **parameters):
        super().__init__(**parameters)
        self.total = Var(shape=(1,), init=0)
        self.s_in = InPort(shape=(3,))
        self.s_out = OutPort(shape=(3,))


@implements(proc=Free, protocol=AsyncProtocol)
@requires(CPU)
@tag("floating_pt", "fixed_pt")
class FreeModel(PyAsyncProcessModel):
    total: np.ndarray = LavaPyType(np.ndarray, np.int64)
    s_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int64)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int64)

    def run_async(self):
        for step in range(self.num_steps):
            self.check_for_stop_cmd()
            self.total += self.s_in.recv()[0]
            self.s_out.send(np.full(3, step))
