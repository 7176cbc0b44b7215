"""GPU energy: the arithmetic on traces (synthetic ones), the measuring loop, and the roofline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_networks import Adaptive, conv_network, images_for

from hardware import gpu
from hardware.errors import GpuMeasurementError, ProfileError
from hardware.gpu import (
    GpuWork,
    PowerTrace,
    Window,
    evaluate,
    gpu_work,
    load_trace,
    measure,
    measure_graph,
    modelled,
)
from hardware.profile import load_profile

SYNTHETIC = Path(__file__).parent / "data" / "synthetic_power_trace.json"
IDLE, BUSY = Window(0.5, 4.5), [Window(5.5, 9.5, 1000), Window(9.5, 13.5, 1000)]


def steady(watts: float, seconds: float = 10.0, tick: float = 0.1) -> PowerTrace:
    """A board at constant power, read exactly when its counter moves, from -0.1 s on."""
    moments = np.arange(-1, round(seconds / tick) + 1) * tick
    counter = 1e9 + 1e3 * watts * moments
    return PowerTrace("board", moments, counter, np.full(len(moments), 1e3 * watts))


class TestEnergyOfATrace:
    def test_total_and_dynamic_energy_of_the_synthetic_trace(self) -> None:
        """60 W idle, 250 W busy, 4 s windows of 1000 images: 1 J in all, 0.76 J above idle."""
        result = evaluate(load_trace(SYNTHETIC), IDLE, BUSY)
        assert result.source == "energy counter"
        assert result.idle_watts == pytest.approx(60, rel=0.01)
        assert result.total_joules_per_image == pytest.approx(1.0, rel=0.01)
        assert result.dynamic_joules_per_image == pytest.approx(0.76, rel=0.01)
        assert result.images_per_second == pytest.approx(250)
        assert result.spread < 0.01
        assert result.tick_seconds == pytest.approx(0.1, rel=0.01)

    def test_windows_need_not_begin_when_the_counter_moves(self) -> None:
        """The counter moves every 100 ms: between two moves power is taken as constant."""
        late = evaluate(steady(200), Window(0.0, 3.0), [Window(3.037, 8.083, 10)])
        assert late.windows[0].total_joules_per_image == pytest.approx(200 * 5.046 / 10, rel=1e-9)
        assert late.windows[0].dynamic_joules_per_image == pytest.approx(0, abs=1e-9)

    def test_a_gpu_without_counter_is_integrated_from_power(self) -> None:
        trace = replace(load_trace(SYNTHETIC), millijoules=np.array([]))
        result = evaluate(trace, IDLE, BUSY)
        assert result.source == "power"
        assert result.total_joules_per_image == pytest.approx(1.0, rel=1e-9)

    def test_spread_over_windows(self) -> None:
        windows = [Window(0, 4, 100), Window(4, 8, 200)]
        result = evaluate(steady(100), Window(0, 3), windows)
        energies = [4.0, 2.0]
        assert [w.total_joules_per_image for w in result.windows] == pytest.approx(energies)
        assert result.spread == pytest.approx(np.std(energies, ddof=1) / 3.0)

    def test_json_keeps_the_trace(self, tmp_path: Path) -> None:
        trace = steady(50)
        (tmp_path / "trace.json").write_text(json.dumps(trace.as_json()))
        again = load_trace(tmp_path / "trace.json")
        assert np.array_equal(again.millijoules, trace.millijoules)
        assert json.dumps(evaluate(again, Window(0, 3), [Window(4, 9, 5)]).as_json())


class TestRefusedTraces:
    def test_a_window_that_is_too_short_for_the_counter(self) -> None:
        with pytest.raises(GpuMeasurementError, match=r"4.000 to 5.000 s: .*moved 11 times.* 20"):
            evaluate(steady(100), Window(0, 3), [Window(4, 5, 10)])

    def test_a_window_outside_the_readings(self) -> None:
        with pytest.raises(GpuMeasurementError, match=r"8.000 to 12.000 s is empty or outside"):
            evaluate(steady(100), Window(0, 3), [Window(8, 12, 10)])

    def test_a_window_without_images(self) -> None:
        with pytest.raises(GpuMeasurementError, match="no image was processed"):
            evaluate(steady(100), Window(0, 3), [Window(4, 8)])

    def test_no_window(self) -> None:
        with pytest.raises(GpuMeasurementError, match="no busy window"):
            evaluate(steady(100), Window(0, 3), [])

    def test_a_counter_that_runs_backwards(self) -> None:
        trace = steady(100)
        trace.millijoules[51:] -= 400_000
        with pytest.raises(GpuMeasurementError, match=r"backwards at 5\.000 s; the driver"):
            evaluate(trace, Window(0, 3), [Window(4, 8, 1)])

    def test_a_counter_that_stands_still(self) -> None:
        trace = replace(steady(100), millijoules=np.zeros(102))
        with pytest.raises(GpuMeasurementError, match="does not move"):
            evaluate(trace, Window(0, 3), [Window(4, 8, 1)])

    def test_readings_out_of_order(self) -> None:
        trace = steady(100)
        trace.seconds[7] = 0.0
        with pytest.raises(GpuMeasurementError, match="do not rise in time"):
            evaluate(trace, Window(0, 3), [Window(4, 8, 1)])

    def test_a_file_that_is_no_trace(self, tmp_path: Path) -> None:
        (tmp_path / "trace.json").write_text('{"device": "x", "seconds": [1]}')
        with pytest.raises(
            GpuMeasurementError, match=r"trace\.json: not a power trace .*millijoules"
        ):
            load_trace(tmp_path / "trace.json")


class SimulatedBoard:
    """A GPU and a clock: idle at 50 W, 300 W while it computes; the counter moves every 100 ms."""

    device = "simulated board"

    def __init__(self, has_counter: bool = True) -> None:
        self.now = self.busy = 0.0
        self.has_counter = has_counter
        self.known = -1.0, 0.0

    def clock(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def compute(self) -> int:
        """A batch of 8 images takes 20 ms."""
        self.now += 0.02
        self.busy += 0.02
        return 8

    def read(self) -> tuple[float | None, float]:
        tick = int(self.now * 10 + 1e-9)
        if tick > self.known[0]:
            self.known = tick, 1e3 * (50 * self.now + 250 * self.busy)
        return (self.known[1] if self.has_counter else None), 50e3


class TestMeasuring:
    def test_idle_first_then_windows_of_work(self) -> None:
        board = SimulatedBoard()
        trace, result = measure(
            board.compute, board, windows=3, window_seconds=4, idle_seconds=4,
            clock=board.clock, pause=board.pause,
        )  # fmt: skip
        assert result.device == "simulated board"
        assert len(result.windows) == 3
        assert result.idle_watts == pytest.approx(50, rel=0.02)
        assert result.total_joules_per_image == pytest.approx(300 * 0.02 / 8, rel=0.02)
        assert result.dynamic_joules_per_image == pytest.approx(250 * 0.02 / 8, rel=0.02)
        assert result.images_per_second == pytest.approx(400, rel=0.02)
        assert np.diff(trace.seconds).min() >= gpu.POLL_SECONDS - 1e-9

    def test_a_board_without_counter(self) -> None:
        board = SimulatedBoard(has_counter=False)
        trace, result = measure(board.compute, board, clock=board.clock, pause=board.pause)
        assert len(trace.millijoules) == 0
        assert result.source == "power"

    def test_without_a_gpu_one_line_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_driver() -> None:
            raise RuntimeError("NVML Shared Library Not Found")

        monkeypatch.setattr(gpu, "NvmlMeter", no_driver)
        problem = gpu.gpu_problem()
        assert problem == "no GPU measured: NVML finds no GPU here (NVML Shared Library Not Found)"
        with pytest.raises(GpuMeasurementError, match="no GPU measured"):
            measure_graph(conv_network(), images_for(conv_network(), 1), 1)

    def test_without_nvml_one_line_says_how_to_get_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_package() -> None:
            raise ModuleNotFoundError("No module named 'pynvml'")

        monkeypatch.setattr(gpu, "NvmlMeter", no_package)
        assert gpu.gpu_problem() == (
            "no GPU measured: package nvidia-ml-py is not installed (extra `gpu`)"
        )

    def test_a_graph_runs_as_a_torch_module_and_each_batch_is_waited_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The GPU is a stand-in: all tensors stay where they are."""
        torch = pytest.importorskip("torch")
        waited: list[bool] = []
        monkeypatch.setattr(gpu, "gpu_problem", lambda: None)
        monkeypatch.setattr(gpu, "NvmlMeter", SimulatedBoard)
        monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
        monkeypatch.setattr(gpu, "measure", lambda workload, meter: (meter, workload()))
        assert measure_graph(conv_network(), images_for(conv_network(), 3), 8) == 8
        assert waited == [True]

    @pytest.mark.gpu
    def test_a_real_gpu(self) -> None:
        if gpu.gpu_problem():
            pytest.skip(str(gpu.gpu_problem()))
        graph = Adaptive(gates=False).build()
        result = measure_graph(graph, images_for(graph, 4), 64)
        assert 0 < result.dynamic_joules_per_image < result.total_joules_per_image


SPIKFORMER_4_384 = GpuWork(
    macs=3_736_000_000, weight_bytes=4 * 9_320_000, value_bytes=4 * 8 * 1_500_000,
    nodes=4 * 80, steps=4,
)  # fmt: skip


class TestRoofline:
    def test_brackets_the_public_figure_for_spikformer_at_batch_1(self) -> None:
        """Prosperity's reference table: A100, batch 1, 19.0 ms and 1824 mJ."""
        low, high, grade = modelled(SPIKFORMER_4_384, load_profile("a100"), 1)
        assert low < 1.824 < high
        assert grade == "assumed"

    def test_a_large_batch_shares_the_overhead(self) -> None:
        single = modelled(SPIKFORMER_4_384, load_profile("a100"), 1)
        many = modelled(SPIKFORMER_4_384, load_profile("a100"), 256)
        assert many[0] < single[0]
        assert many[1] < single[1]

    def test_is_bound_by_arithmetic_at_a_large_batch_of_large_layers(self) -> None:
        """2 x 3.736 GFLOP at 19.5 TFLOP/s x 0.6, 200 W: 0.128 J."""
        low, _, _ = modelled(SPIKFORMER_4_384, load_profile("a100"), 4096)
        assert low == pytest.approx(2 * 3.736e9 / (19.5e12 * 0.6) * 200)

    def test_one_pass_in_8_bits(self) -> None:
        ann = SPIKFORMER_4_384.one_pass()
        assert (ann.macs, ann.steps, ann.int8) == (934_000_000, 1, True)

    def test_work_of_a_graph(self) -> None:
        work = gpu_work(conv_network(steps=3))
        assert work.macs == 3 * (1512 + 192 + 120)
        assert work.weight_bytes == 4 * (4 * 2 * 9 + 6 * 2 * 4 + 5 * 24)

    def test_a_profile_that_is_no_gpu(self) -> None:
        with pytest.raises(ProfileError, match="'loihi1' is a chip, a GPU is wanted"):
            modelled(SPIKFORMER_4_384, load_profile("loihi1"), 1)


class TestReadingsOfATraceFile:
    @pytest.mark.parametrize(
        ("field", "values"),
        [
            ("millijoules", [1.0]),
            ("milliwatts", [1.0, 2.0, 3.0]),
            ("seconds", [0.0, float("nan")]),
            ("seconds", [[0.0, 1.0]]),
        ],
    )
    def test_that_do_not_belong_together_are_refused(self, tmp_path, field, values) -> None:
        content = {"seconds": [0, 1], "millijoules": [0, 1], "milliwatts": [1, 1]}
        path = tmp_path / "trace.json"
        path.write_text(json.dumps({"device": "board", **content, field: values}))
        with pytest.raises(GpuMeasurementError, match="not a power trace"):
            load_trace(path)
