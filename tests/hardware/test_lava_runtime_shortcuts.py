"""What the in-process Lava runtime leaves out changes nothing: messages, phases, layout, order."""

# Not sorted: Lava is imported after its shim.
# ruff: isort: skip_file

from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.sparse import csr_matrix

from export.errors import LavaUnavailableError

try:
    from hardware.lava_runtime import InProcessRuntime, handlers, in_process
except LavaUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.run_conditions import RunSteps
from lava.magma.core.run_configs import Loihi2SimCfg
from lava.proc.dense.process import Dense
from lava.proc.io.sink import RingBuffer as Sink
from lava.proc.io.source import RingBuffer as Source
from lava.proc.lif.process import LIF
from hardware.lava_runtime.channels import Channel, End, taken_as
from hardware.lava_runtime.tasks import LoihiDomain, Order, Scheduler, Task
from lava_runtime_models.processes import Counter, Phases, Relay
from lava_runtime_networks import NETWORKS

pytestmark = pytest.mark.lava

END = End("", "")
TYPES = [np.dtype(name) for name in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "f4", "f8")]


def built(*processes, tag: str = "fixed_pt") -> InProcessRuntime:
    return InProcessRuntime(processes[0], Loihi2SimCfg(select_tag=tag))


def driven(size: int, **parameters) -> LIF:
    return LIF(shape=(size,), vth=3, bias_mant=np.arange(size), bias_exp=4, **parameters)


class TestMessages:
    @settings(deadline=None)
    @given(st.data(), st.sampled_from(TYPES), st.sampled_from(TYPES), st.sampled_from(TYPES))
    def test_arrive_as_lavas_in_port_hands_them_on(self, data, sent, channels, ports):
        message = data.draw(hnp.arrays(sent, hnp.array_shapes(max_dims=2, max_side=4)))
        message = data.draw(st.sampled_from([message, np.asfortranarray(message)]))
        with np.errstate(invalid="ignore", over="ignore"):
            cast = np.empty(message.shape, channels)
            cast[...] = message
            expected = np.zeros(message.shape, ports) + cast
            channel = Channel(END, END, message.shape, channels, 1)
            channel.taken = taken_as(channels, ports)
            found = channel.message(message)
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()
        assert found.flags.c_contiguous
        assert not np.shares_memory(found, message)

    def test_of_a_sparse_matrix_are_its_values(self):
        channel = Channel(END, END, (2,), np.dtype(np.int32), 1)
        assert channel.message(csr_matrix(np.array([[0, 2], [3, 0]]))).tolist() == [2, 3]

    def test_are_the_receivers_own(self):
        """What the sender writes into its array later does not reach the receiver."""
        counter, sink = Counter(), Sink(shape=(3,), buffer=3)
        counter.s_out.connect(sink.a_in)
        with built(counter) as runtime:
            model = runtime.model(counter)
            buffer = np.zeros(3, np.int64)

            def run_spk():
                buffer[:] = model.time_step
                model.s_out.send(buffer)
                buffer[:] = -1

            model.run_spk = run_spk
            runtime.run(RunSteps(3))
            np.testing.assert_array_equal(sink.data.get()[0], [1, 2, 3])


class TestPhases:
    @pytest.mark.parametrize(
        "name",
        [
            "chain, fixed",
            "chain, float",
            "RefPorts",
            "several RefPorts, reshaped",
            "learning and management phases",
            "plastic synapses, fixed",
            "hierarchical processes",
        ],
    )
    def test_values_are_those_of_lavas_own_handlers(self, name, monkeypatch):
        def record():
            np.random.seed(0)  # noqa: NPY002  (models of Lava's use the global generator)
            with in_process():
                return NETWORKS[name]().record()

        short = record()
        monkeypatch.setattr(handlers, "is_plain", lambda model: False)
        for key, value in record().items():
            np.testing.assert_array_equal(short[key], value, err_msg=key)

    @pytest.mark.parametrize("plain", [True, False])
    def test_a_model_without_guards_knows_its_phase(self, plain, monkeypatch):
        if not plain:
            monkeypatch.setattr(handlers, "is_plain", lambda model: False)
        phases, lif = Phases(learns=2, prepares=2, reports=1), driven(1)
        lif.s_out.connect(phases.s_in)
        phases.s_out.connect(lif.a_in)
        seen = []
        with built(phases) as runtime:
            model = runtime.model(lif)
            note = runtime.model(phases)._note
            runtime.model(phases)._note = lambda phase: (
                seen.append(int(model.phase[0])),
                note(phase),
            )
            runtime.run(RunSteps(4))
            assert (model.time_step, int(model.phase[0])) == (4, 5)
        assert sorted(set(seen)) == [1, 2, 3, 4]

    @pytest.mark.parametrize("steps", [1, 3])
    @pytest.mark.parametrize("asks", ["_req_pause", "_req_stop"])
    def test_a_model_without_guards_may_pause_or_stop(self, asks, steps):
        lif = driven(2)
        runtime = built(lif)
        model = runtime.model(lif)
        activation = model.spiking_activation

        def spiking_activation():
            if model.time_step == steps:
                setattr(model, asks, True)
            return activation()

        model.spiking_activation = spiking_activation
        runtime.run(RunSteps(9))
        assert model.time_step == steps
        assert runtime._is_started == (asks == "_req_pause")
        runtime.stop()

    def test_only_models_with_a_spiking_phase_alone_are_plain(self):
        lif, counter = driven(2), Counter()
        with built(lif) as one, built(counter) as other:
            model = one.model(lif)
            assert handlers.is_plain(model)
            assert not handlers.is_plain(other.model(counter))  # has a guard
            for name in ("post_guard", "_spike", "advance_to_time_step"):
                setattr(model, name, getattr(model, name))  # for a debugger, on the object
                assert not handlers.is_plain(model)
                delattr(model, name)
            model._cmd_handlers[1] = print
            assert not handlers.is_plain(model)

    @pytest.mark.parametrize("name", ["_spike", "pre_guard", "lrn_guard", "_host", "__setattr__"])
    def test_nor_are_those_that_define_more(self, name):
        lif = driven(2)
        with built(lif) as runtime:
            model = runtime.model(lif)
            kind = type(model)
            own = type("Own", (kind,), {name: lambda self, *given: None})
            object.__setattr__(model, "__class__", own)
            assert not handlers.is_plain(model)
            object.__setattr__(model, "__class__", kind)
            assert handlers.is_plain(model)

    def test_a_guard_that_is_set_between_runs_is_asked(self):
        lif = driven(2)
        with built(lif) as runtime:
            runtime.run(RunSteps(2))
            model, reported = runtime.model(lif), []
            model.post_guard = lambda: True
            model.run_post_mgmt = lambda: reported.append(model.time_step)
            runtime.run(RunSteps(2))
            assert reported == [3, 4]


class TestLayout:
    @settings(deadline=None)
    @given(st.data(), st.sampled_from([np.float64, np.int32]))
    def test_sums_of_columns_are_the_same_to_the_bit(self, data, dtype):
        shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
        seed = data.draw(st.integers(0, 2**32 - 1))
        rng = np.random.default_rng(seed)
        matrix = (rng.standard_normal(shape) * 10.0 ** rng.integers(-9, 9, shape)).astype(dtype)
        fired = rng.random(shape[1]) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        by_row = matrix[:, fired].sum(axis=1)
        by_column = handlers.by_column(matrix)[:, fired].sum(axis=1)
        assert by_row.tobytes() == by_column.tobytes()
        assert by_row.dtype == by_column.dtype

    @pytest.mark.parametrize("tag", ["fixed_pt", "floating_pt"])
    def test_follows_what_dense_does_with_its_weights(self, tag):
        """A column at a time, until messages have more than a bit: then a product, by row."""
        values = np.random.default_rng(0).standard_normal((7, 5)) * 20
        source = Source(data=np.random.default_rng(1).integers(0, 2, (5, 9)))
        dense, sink = Dense(weights=values), Sink(shape=(7,), buffer=9)
        source.s_out.connect(dense.s_in)
        dense.a_out.connect(sink.a_in)
        with built(source, tag=tag) as runtime:
            model = runtime.model(dense)
            runtime.run(RunSteps(3))
            assert model.weights.flags.f_contiguous
            dense.num_message_bits.set(np.array([8]))
            runtime.run(RunSteps(3))
            assert model.weights.flags.c_contiguous
            dense.num_message_bits.set(np.array([0]))
            dense.weights.set(2 * dense.weights.get())
            runtime.run(RunSteps(3))
            assert model.weights.flags.f_contiguous
            assert sink.data.get().any()
            np.testing.assert_array_equal(dense.weights.get(), model.weights)
            if tag == "floating_pt":
                np.testing.assert_array_equal(dense.weights.get(), 2 * values)

    def test_of_graded_messages_is_lavas(self):
        dense = Dense(weights=np.ones((3, 2)), num_message_bits=8)
        with built(dense, tag="floating_pt") as runtime:
            runtime.run(RunSteps(2))
            assert runtime.model(dense).weights.flags.c_contiguous


class TestOrder:
    @staticmethod
    def waits(monkeypatch, runtime: InProcessRuntime, steps: int) -> int:
        """How many times a task waits in some steps."""
        original, found = Scheduler.wait, []

        def wait(self, port):
            found.append(port)
            original(self, port)

        monkeypatch.setattr(Scheduler, "wait", wait)
        runtime.run(RunSteps(steps))
        monkeypatch.setattr(Scheduler, "wait", original)
        return len(found)

    def test_in_a_chain_nobody_waits_after_a_few_steps(self, monkeypatch):
        relays = [Relay() for _ in range(12)][::-1]
        counter = Counter()
        chain: list[Any] = [counter, *relays]
        for sender, receiver in pairwise(chain):
            sender.s_out.connect(receiver.s_in)
        with built(counter) as runtime:
            runtime.run(RunSteps(4))
            assert self.waits(monkeypatch, runtime, 10) == 0

    def test_in_a_circle_one_waits(self, monkeypatch):
        lif, dense = driven(4), Dense(weights=np.eye(4))
        lif.s_out.connect(dense.s_in)
        dense.a_out.connect(lif.a_in)
        with built(lif) as runtime:
            runtime.run(RunSteps(3 * Order.PATIENCE))
            assert self.waits(monkeypatch, runtime, 10) == 10

    def test_of_fewest_waits_stays_if_none_is_without(self):
        order = Order()
        order.tasks = first = [Task(None, None, LoihiDomain()) for _ in range(3)]
        for delayed in (1, *[2] * Order.PATIENCE):
            order.delayed.extend(order.tasks[:delayed])
            order.improve()
        assert order.tasks == first
        order.delayed.append(first[0])
        order.improve()
        assert order.tasks == first
        assert not order.delayed


class TestWorkers:
    def test_a_model_that_holds_on_to_its_port_is_ended_too(self):
        relay, runs = Relay(name="relay"), []
        other = Relay(name="other")
        relay.s_out.connect(other.s_in)
        other.s_out.connect(relay.s_in)
        runtime = built(relay)
        model = runtime.model(relay)

        def run_spk():
            runs.append(1)
            for _ in range(3):
                with suppress(BaseException):  # a careless model
                    model.s_in.recv()

        model.run_spk = run_spk
        with pytest.raises(RuntimeError, match="deadlock at time step 1"):
            runtime.run(RunSteps(2))
        assert runs == [1]

    def test_an_error_after_run_spk_is_the_models_too(self):
        lif = driven(2)
        runtime = built(lif)
        runtime.model(lif)._req_pause = True
        runtime.model(lif)._req_rs_pause = lambda: {}["no answer"]
        with pytest.raises(RuntimeError, match=r"failed in time step 1, spiking phase: KeyError"):
            runtime.run(RunSteps(2))
        with pytest.raises(RuntimeError, match="runtime has failed"):
            runtime.run(RunSteps(1))

    def test_an_error_outside_a_model_ends_the_run_as_it_is(self, monkeypatch):
        lif = driven(2)
        runtime = built(lif)
        monkeypatch.setattr(LoihiDomain, "next_tasks", lambda self: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            runtime.run(RunSteps(2))
        with pytest.raises(RuntimeError, match="runtime has failed"):
            runtime.run(RunSteps(1))


def test_lavas_base_class_is_as_the_shortcuts_assume():
    """With other handlers in Lava, `handlers.py` would have to be read again."""
    import inspect

    source = inspect.getsource(PyLoihiProcessModel._spike)
    assert "self.run_spk()" in source
    assert "self.advance_to_time_step(self.time_step + 1)" in source
    for name in ("pre_guard", "lrn_guard", "post_guard"):
        assert getattr(PyLoihiProcessModel, name)(None) is None
