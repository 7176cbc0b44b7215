"""Lava networks in one interpreter: what they compute, how they fail, and what they leave."""

# Not sorted: Lava is imported after its shim.
# ruff: isort: skip_file

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from tiny_networks import Adaptive, conv_network, images_for

from export.errors import LavaUnavailableError
from hardware.engine import run as run_engine
from hardware.errors import LavaDeadlockError, LavaModelError, LavaRuntimeError
from hardware.verify import verify

try:
    from hardware.lava_runtime import InProcessRuntime, in_process, run_graph
except LavaUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.run_conditions import RunContinuous, RunSteps
from lava.magma.core.run_configs import Loihi2SimCfg
from lava.proc.io.extractor import Extractor, VarWire
from lava.proc.io.injector import Injector
from lava.proc.io.sink import RingBuffer as Sink
from lava.proc.lif.process import LIF
from lava_runtime_models.processes import (
    Counter,
    Free,
    Layer,
    Mutual,
    Phases,
    Reader,
    Relay,
    Values,
)
from lava_runtime_networks import NETWORKS, weights

pytestmark = pytest.mark.lava

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPARED_ALWAYS = (
    "chain, fixed",
    "recurrent, float",
    "RefPorts",
    "learning and management phases",
    "variables set between runs",
)


def in_child(script: str, *arguments: str, timeout: float = 250) -> str:
    """The last line that a script prints in an interpreter of its own."""
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return (done.stdout.strip().splitlines() or [""])[-1]


def network(*processes: AbstractProcess, **options) -> InProcessRuntime:
    return InProcessRuntime(processes[0], Loihi2SimCfg(select_tag="fixed_pt"), **options)


def ring(*relays: Relay) -> Relay:
    """Relays in a circle, each waiting for the one before it."""
    for relay, following in zip(relays, (*relays[1:], relays[0]), strict=True):
        relay.s_out.connect(following.s_in)
    return relays[0]


def failing(how: str, **options) -> InProcessRuntime:
    """A counter, a relay that fails at step 3, and a sink."""
    counter, relay, sink = Counter(), Relay(how, 3, name="relay"), Sink(shape=(3,), buffer=9)
    counter.s_out.connect(relay.s_in)
    relay.s_out.connect(sink.a_in)
    return network(counter, **options)


class TestSameAsLavasOwnRuntime:
    @pytest.fixture(scope="class")
    def lavas(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("lava") / "results.npz"
        in_child("lava_runtime_networks.py", str(path), *COMPARED_ALWAYS)
        return np.load(path)

    @pytest.mark.parametrize("name", COMPARED_ALWAYS)
    def test_every_value_at_every_step(self, name, lavas):
        assert_same(name, lavas)

    @pytest.mark.slow
    def test_all_networks(self, tmp_path):
        path = tmp_path / "results.npz"
        in_child("lava_runtime_networks.py", str(path), *NETWORKS)
        lavas = np.load(path)
        assert len(NETWORKS) >= 20
        for name in NETWORKS:
            assert_same(name, lavas)


def assert_same(name: str, lavas) -> None:
    np.random.seed(0)  # noqa: NPY002  (models of Lava's use the global generator)
    with in_process():
        ours = NETWORKS[name]().record()
    assert ours
    for key, value in ours.items():
        expected = lavas[f"{name}/{key}"]
        assert value.dtype == expected.dtype, (name, key)
        np.testing.assert_array_equal(value, expected, err_msg=f"{name}: {key}")


class TestOurNetworks:
    @pytest.mark.parametrize("grain", ["layers", "blocks"])
    @pytest.mark.parametrize(
        "graph",
        [conv_network(), Adaptive(merge=2, fraction_bits=4, channels=8).build()],
        ids=["convolution", "adaptive tokens"],
    )
    def test_fire_the_spikes_of_the_engine(self, graph, grain):
        images = images_for(graph, 3)
        trace, expected = run_graph(graph, images, grain), run_engine(graph, images).trace
        for name, value in trace.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        assert any(value.any() for value in trace.values())

    def test_tell_how_far_they_are(self):
        graph, seen = conv_network(steps=3), []
        images = images_for(graph, 2)
        run_graph(graph, images, "blocks", on_progress=lambda *place: seen.append(place))
        total = seen[-1][1]
        assert seen[0] == (3, total)
        assert seen[-1] == (total, total)

    @pytest.mark.slow
    @pytest.mark.parametrize("grain", ["layers", "blocks"])
    def test_fire_the_spikes_of_lavas_own_runtime(self, grain):
        from export.lava import run_lava

        graph = Adaptive(merge=2, fraction_bits=4).build()
        images = images_for(graph, 3)
        ours, lavas = run_graph(graph, images, grain), run_lava(graph, images, grain)
        assert ours.keys() == lavas.keys()
        for name, value in lavas.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=name)


class TestRunning:
    def test_pieces_of_a_run_are_the_run(self):
        whole, pieces = Counter(), Counter()
        with network(whole) as one, network(pieces) as other:
            one.run(RunSteps(12))
            for steps in (1, 7, 0, 4):
                other.run(RunSteps(steps))
            np.testing.assert_array_equal(one.get(whole.v), other.get(pieces.v))

    def test_networks_side_by_side(self):
        counters = [Counter() for _ in range(3)]
        runtimes = [network(counter) for counter in counters]
        for steps in (2, 3):
            for runtime in runtimes:
                runtime.run(RunSteps(steps))
        values = [
            runtime.get(counter.v)[0] for runtime, counter in zip(runtimes, counters, strict=True)
        ]
        assert values[0] == values[1] == values[2] != 1

    def test_networks_in_threads(self):
        counters = [Counter() for _ in range(3)]
        runtimes = [network(counter) for counter in counters]
        threads = [threading.Thread(target=r.run, args=(RunSteps(50),)) for r in runtimes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({int(c.v.get()[0]) for c in counters}) == 1
        assert all(
            runtime.model(c).time_step == 50 for runtime, c in zip(runtimes, counters, strict=True)
        )

    def test_process_methods_use_the_runtime(self):
        counter = Counter()
        runtime = network(counter)
        counter.run(RunSteps(3))
        assert counter.runtime is runtime
        assert runtime.model(counter).time_step == 3
        counter.stop()
        with pytest.raises(LavaRuntimeError, match="runtime has stopped; make a new"):
            counter.run(RunSteps(1))

    def test_from_the_beginning_without_another_compilation(self):
        counter, reader = Counter(), Reader()
        reader.ref.connect_var(counter.v)
        first, values = network(counter), []
        for runtime in (first, InProcessRuntime(counter, executable=first.executable)):
            runtime.run(RunSteps(4))
            values.append(runtime.get(counter.v))
            runtime.stop()
            runtime.stop()
        np.testing.assert_array_equal(*values)

    def test_run_continuous_is_refused_by_name(self):
        with network(Counter()) as runtime:
            with pytest.raises(LavaRuntimeError, match=r"RunContinuous needs .* use RunSteps"):
                runtime.run(RunContinuous())
            with pytest.raises(LavaRuntimeError, match=r"RunSteps\(-1\): give 0 steps or more"):
                runtime.run(RunSteps(-1))

    def test_without_run_configuration(self):
        with pytest.raises(LavaRuntimeError, match="process counter is not compiled"):
            InProcessRuntime(Counter(name="counter"))

    @pytest.mark.parametrize("phase", [1, 2, 3, 4])
    def test_pause_asked_for_by_a_model(self, phase):
        process = Phases(learns=1, prepares=1, reports=1, pauses=(3, phase))
        with network(process) as runtime:
            runtime.run(RunSteps(10))
            log = [value for value in runtime.get(process.log) if value]
            assert [value // 10 for value in log][-1] == 3
            runtime.run(RunSteps(2))
            assert runtime.model(process).time_step == 5

    def test_stop_asked_for_by_a_model(self):
        process = Phases(reports=1, stops=(2, 4))
        runtime = network(process)
        runtime.run(RunSteps(10))
        with pytest.raises(LavaRuntimeError, match="runtime has stopped"):
            runtime.run(RunSteps(1))

    def test_order_of_phases(self):
        process = Phases(learns=2, prepares=4, reports=3)
        with network(process) as runtime:
            runtime.run(RunSteps(6))
            log = [value for value in runtime.get(process.log) if value]
        assert log == [11, 21, 23, 31, 34, 41, 42, 43, 51, 61, 63, 64]

    def test_asynchronous_models_beside_synchronous_ones(self):
        counter, free, sink = Counter(), Free(), Sink(shape=(3,), buffer=5)
        counter.s_out.connect(free.s_in)
        free.s_out.connect(sink.a_in)
        with network(counter) as runtime:
            runtime.run(RunSteps(5))
            np.testing.assert_array_equal(sink.data.get()[0], range(5))
            assert runtime.get(free.total)[0] > 0

    def test_copies_of_parameters_are_the_models_own(self):
        table = np.zeros(3)
        for copy, expected in ((True, 0), (False, 4)):
            with network(Values(table=table), copy_parameters=copy) as runtime:
                runtime.run(RunSteps(4))
            assert table[0] == expected


class TestNotBlocking:
    def test_steps_are_taken_in_wait(self):
        counter = Counter()
        with network(counter) as runtime:
            runtime.run(RunSteps(6, blocking=False))
            assert runtime.is_running
            with pytest.raises(LavaRuntimeError, match=r"is running; wait\(\), pause\(\) or stop"):
                counter.v.get()
            with pytest.raises(LavaRuntimeError, match="is running"):
                runtime.run(RunSteps(1))
            runtime.wait()
            assert runtime.model(counter).time_step == 6

    def test_pause_ends_the_run(self):
        counter = Counter()
        with network(counter) as runtime:
            runtime.run(RunSteps(6, blocking=False))
            runtime.pause()
            assert not runtime.is_running
            assert runtime.model(counter).time_step < 6
            runtime.run(RunSteps(2))

    def test_injector_and_extractor(self):
        injector, extractor = Injector(shape=(2,)), Extractor(shape=(2,))
        injector.out_port.connect(extractor.in_port)
        with InProcessRuntime(injector, Loihi2SimCfg()) as runtime:
            runtime.run(RunSteps(4, blocking=False))
            for number in range(4):
                injector.send(np.full(2, number))
                assert extractor.receive().tolist() == [number, number]
            runtime.wait()

    def test_nothing_to_receive(self):
        injector, extractor = Injector(shape=(2,)), Extractor(shape=(2,))
        injector.out_port.connect(extractor.in_port)
        with InProcessRuntime(injector, Loihi2SimCfg()) as runtime:
            runtime.run(RunSteps(1, blocking=False))
            with pytest.raises(LavaRuntimeError, match=r"nothing arrives from .*out_port"):
                extractor.receive()
            with pytest.raises(LavaDeadlockError, match="in_port for a message from outside"):
                runtime.wait()

    def test_var_wire_is_refused_by_name(self):
        counter, wire = Counter(), VarWire()
        wire.connect_var(counter.v)
        with pytest.raises(LavaRuntimeError, match=r"\(VarWire\) brings a channel of its own"):
            InProcessRuntime(counter, Loihi2SimCfg())

    def test_another_thread_may_not_take_the_steps(self):
        errors = []

        def wait() -> None:
            try:
                runtime.wait()
            except LavaRuntimeError as error:
                errors.append(str(error))

        with network(Counter()) as runtime:
            runtime.run(RunSteps(1, blocking=False))
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join()
            assert "runs in another thread" in errors[0]


class TestVariables:
    def test_each_type(self):
        values = Values()
        with network(values) as runtime:
            assert runtime.get(values.matrix).dtype == np.int64
            assert values.matrix.get().dtype == np.float64
            values.matrix.set(np.arange(6.0).reshape(2, 3) + 0.9)
            runtime.set(values.text, "vwxyz")
            runtime.set(values.whole, np.array([12]))
            assert runtime.get(values.matrix).tolist() == [[0, 1, 2], [3, 4, 5]]
            assert values.text.get() == runtime.get(values.text) == "vwxyz"
            assert runtime.get(values.whole) == 12
            assert values.sparse.get().toarray().tolist() == [[0, 2], [3, 0]]
            assert runtime.model(values).updates == 3

    def test_a_float(self):
        lif = LIF(shape=(2,), vth=2.5)
        with InProcessRuntime(lif, Loihi2SimCfg(select_tag="floating_pt")) as runtime:
            assert lif.vth.get() == runtime.get(lif.vth) == 2.5
            lif.vth.set(np.array([3.5]))
            assert runtime.model(lif).vth == 3.5

    def test_what_is_got_is_a_copy(self):
        values = Values()
        with network(values) as runtime:
            runtime.get(values.matrix)[:] = 99
            values.matrix.get()[:] = 99
            assert runtime.get(values.matrix).max() == 5

    def test_large_integers_are_exact(self):
        values = Values()
        with network(values) as runtime:
            runtime.set(values.matrix, np.full((2, 3), 2**62 + 1))
            assert runtime.get(values.matrix)[0, 0] == 2**62 + 1

    def test_wrong_size(self):
        values = Values(name="values")
        with network(values) as runtime:
            message = r"variable matrix of values: 4 elements given, it has 6 of shape \(2, 3\)"
            with pytest.raises(LavaRuntimeError, match=message):
                values.matrix.set(np.zeros((2, 2)))
            assert runtime.get(values.matrix).max() == 5

    def test_of_another_network(self):
        other = Counter(name="other")
        with network(Counter()) as runtime:
            with pytest.raises(LavaRuntimeError, match="variable v belongs to no process model"):
                runtime.get(other.v)
            with pytest.raises(LavaRuntimeError, match="process other has no process model"):
                runtime.model(other)

    def test_alias_of_a_hierarchical_process(self):
        layer = Layer(weights(4, 3))
        cfg = Loihi2SimCfg(select_tag="fixed_pt", select_sub_proc_model=True)
        with InProcessRuntime(layer, cfg) as runtime:
            runtime.set(layer.v, np.arange(4))
            assert layer.v.get().tolist() == [0, 1, 2, 3]

    def test_reading_ten_thousand_values_takes_no_time(self):
        lif = LIF(shape=(100, 100))
        with network(lif):
            start = time.perf_counter()
            for _ in range(20):
                lif.v.get()
            assert (time.perf_counter() - start) / 20 < 0.01  # Lava: 24 µs a value, 0.24 s


class TestFailures:
    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("value", "process relay (RelayModel) failed in time step 3, spiking phase: KeyError"),
            (
                "shape",
                "process relay (RelayModel) failed in time step 3, spiking phase at port s_out: "
                "ValueError: a message of shape (2,) sent to Process_",
            ),
            ("management", "failed in time step 3, post-management phase: OSError: no disk"),
        ],
    )
    def test_a_model_that_raises(self, how, message):
        runtime = failing(how)
        start = time.perf_counter()
        with pytest.raises(LavaModelError) as caught:
            runtime.run(RunSteps(9))
        assert time.perf_counter() - start < 1
        assert message in str(caught.value)
        assert (caught.value.process, caught.value.time_step) == ("relay", 3)
        assert caught.value.port == ("s_out" if how == "shape" else None)
        assert isinstance(caught.value, RuntimeError)
        assert caught.value.__cause__ is not None

    def test_a_model_that_cannot_be_constructed(self):
        with pytest.raises(LavaModelError, match="failed in construction: ZeroDivisionError"):
            failing("construction")

    def test_wrong_sum_at_an_in_port(self):
        counters, relay = [Counter(), Counter()], Relay(name="relay")
        for counter in counters:
            counter.s_out.connect(relay.s_in)
        runtime = network(counters[0])
        runtime.model(relay).s_in._shape = (5,)
        with pytest.raises(LavaModelError, match="at port s_in: ValueError: operands could not"):
            runtime.run(RunSteps(1))

    def test_an_interrupt_stays_an_interrupt(self):
        runtime = failing("interrupt")
        with pytest.raises(KeyboardInterrupt):
            runtime.run(RunSteps(9))
        with pytest.raises(LavaRuntimeError, match="runtime has failed"):
            runtime.run(RunSteps(1))

    def test_nothing_hangs_afterwards(self):
        runtime = failing("value")
        with pytest.raises(LavaModelError):
            runtime.run(RunSteps(9))
        runtime.stop()
        with pytest.raises(LavaRuntimeError, match="runtime has failed; make a new"):
            runtime.run(RunSteps(1))
        with network(Counter()) as following:
            following.run(RunSteps(1))

    @pytest.mark.parametrize("tries", [5, pytest.param(100, marks=pytest.mark.slow)])
    def test_within_a_second_every_time(self, tries):
        for _ in range(tries):
            runtime = failing("value")
            start = time.perf_counter()
            with pytest.raises(LavaModelError):
                runtime.run(RunSteps(9))
            assert time.perf_counter() - start < 1


class TestDeadlocks:
    def test_a_circle(self):
        first, second = Relay(name="first"), Relay(name="second")
        with pytest.raises(LavaDeadlockError) as caught:
            network(ring(first, second)).run(RunSteps(3))
        assert "deadlock at time step 1 (spiking phase)" in str(caught.value)
        assert sorted(caught.value.waiting) == [
            "first waits at s_in for second.s_out",
            "second waits at s_in for first.s_out",
        ]

    def test_a_process_that_sends_nothing(self):
        runtime = failing("silence")
        with pytest.raises(LavaDeadlockError, match=r"waits at a_in for relay\.s_out"):
            runtime.run(RunSteps(9))

    def test_a_process_that_sends_too_much(self):
        counter, relay = Counter(name="counter"), Relay("", times=2, name="relay")
        sink = Sink(shape=(3,), buffer=9)
        sink.name = "sink"
        counter.s_out.connect(relay.s_in)
        relay.s_out.connect(sink.a_in)
        message = r"relay waits at s_out for room: 64 messages lie unread at sink\.a_in"
        with pytest.raises(LavaDeadlockError, match=message):
            network(counter).run(RunSteps(100))

    @pytest.mark.parametrize("phase", ["post", "spiking"])
    def test_reading_each_other(self, phase):
        one, other = Mutual(phase, name="one"), Mutual(phase, name="other")
        one.ref.connect_var(other.v)
        other.ref.connect_var(one.v)
        with pytest.raises(LavaDeadlockError, match=r"one waits at ref for other\."):
            network(one).run(RunSteps(1))

    def test_written_without_waiting_is_there_after_the_run(self):
        one, other = Mutual("written"), Mutual("written")
        one.ref.connect_var(other.v)
        other.ref.connect_var(one.v)
        with network(one) as runtime:
            runtime.run(RunSteps(5))
            assert [runtime.get(one.v)[0], runtime.get(other.v)[0]] == [5, 5]


class TestNothingIsLeft:
    def test_of_a_network(self):
        shared = set(os.listdir("/dev/shm"))
        threads = threading.active_count()
        handlers = len(logging.getLogger().handlers)
        counter, reader = Counter(), Reader()
        reader.ref.connect_var(counter.v)
        with network(counter) as runtime:
            runtime.run(RunSteps(3))
            assert threading.active_count() == threads
        assert set(os.listdir("/dev/shm")) == shared
        assert len(logging.getLogger().handlers) == handlers

    def test_users_own_handlers_stay(self):
        root = logging.getLogger()
        own = [logging.StreamHandler(), logging.StreamHandler(), logging.NullHandler()]
        own[1].setLevel(logging.ERROR)
        for handler in own:
            root.addHandler(handler)
        try:
            network(Counter()).stop()
            assert all(handler in root.handlers for handler in own)
        finally:
            for handler in own:
                root.removeHandler(handler)

    def test_models_go_when_the_runtime_stops(self):
        counter = Counter(shape=(1000,))
        runtime = network(counter)
        runtime.run(RunSteps(1))
        model = weakref.ref(runtime.model(counter))
        gc.disable()
        try:
            runtime.stop()
            assert model() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize(
        ("cycles", "warm_up"),
        [(200, 60), pytest.param(2000, 200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
    )
    def test_of_many_networks(self, cycles, warm_up):
        seen = json.loads(
            in_child("lava_runtime_cycles.py", str(cycles), str(warm_up), timeout=800)
        )
        before, after = seen["before"], seen["after"]
        assert after.pop("memory") <= 1.05 * before.pop("memory")
        assert after == before
        assert after["children"] == after["root handlers"] == after["compiler handlers"] == 0
        assert after["processes"] == after["variables"] == 0


class TestInProcess:
    def test_lavas_own_run_comes_here(self):
        counter = Counter()
        with in_process():
            counter.run(RunSteps(3), Loihi2SimCfg(select_tag="fixed_pt"))
        assert isinstance(counter.runtime, InProcessRuntime)
        counter.stop()

    def test_outside_lava_runs_as_ever(self):
        original = AbstractProcess.create_runtime
        with in_process():
            assert AbstractProcess.create_runtime is not original
        with pytest.raises(KeyError), in_process():
            raise KeyError
        assert AbstractProcess.create_runtime is original


def test_without_greenlet():
    script = (
        "import sys; sys.modules['greenlet'] = None\n"
        "from export.errors import LavaUnavailableError\n"
        "try:\n    import hardware.lava_runtime\n"
        "except LavaUnavailableError as error:\n    print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert "needs greenlet: pip install greenlet" in done.stdout, done.stderr[-500:]


def test_verify_knows_it_as_a_stage():
    graph = conv_network()
    result = verify(graph, images_for(graph, 2), ["lava-blocks-inprocess", "lava-layers-inprocess"])
    assert result.equal
    assert [stage.to_stage for stage in result.stages] == [
        "lava-blocks-inprocess",
        "lava-layers-inprocess",
    ]
