"""Energy of a network on a GPU: measured through NVML, or modelled from a profile by a roofline.

A measurement is a *trace*: readings of the board's energy counter and power over time. All
arithmetic is in pure functions over a trace (`evaluate`), so that it is tested without a GPU. The
counter moves only about every 100 ms; between two moves the power is taken as constant, and a
window that sees few moves is refused.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from export.graph import Attention, Conv, Graph, Linear, Readout
from hardware.engine.plan import dense_macs, image_axis, make_plan, select
from hardware.errors import GpuMeasurementError, ProfileError
from hardware.profile import Grade, Profile, weakest

Floats = npt.NDArray[np.float64]

WINDOWS = 5
WINDOW_SECONDS = 4.0
IDLE_SECONDS = 4.0
POLL_SECONDS = 0.01
MINIMUM_TICKS = 20
"""A window in which the counter moves less often than this is too short to be trusted."""


# --- the arithmetic ---


@dataclass(frozen=True)
class PowerTrace:
    """Readings of one GPU, all float64 [n].

    Attributes:
        device: name of the GPU.
        seconds: time of each reading, strictly rising.
        millijoules: the board's energy counter (NVML "total energy consumption"); empty if the GPU
            has none, then energy is the integral of power.
        milliwatts: power.
    """

    device: str
    seconds: Floats
    millijoules: Floats
    milliwatts: Floats

    def as_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "seconds": self.seconds.tolist(),
            "millijoules": self.millijoules.tolist(),
            "milliwatts": self.milliwatts.tolist(),
        }


@dataclass(frozen=True)
class Window:
    """A stretch of a trace in which `images` images were processed (0: the GPU was idle)."""

    start: float
    stop: float
    images: int = 0


@dataclass(frozen=True)
class WindowEnergy:
    """Energy of one window: joules per image, in all and above idle."""

    seconds: float
    images: int
    total_joules_per_image: float
    dynamic_joules_per_image: float
    ticks: int


@dataclass(frozen=True)
class GpuMeasurement:
    """What a trace says.

    Attributes:
        device: name of the GPU.
        idle_watts: mean power of the idle window.
        windows: one entry per busy window.
        source: "energy counter" or "power".
        tick_seconds: mean time between two moves of the counter (of readings, if from power).
    """

    device: str
    idle_watts: float
    windows: tuple[WindowEnergy, ...]
    source: str
    tick_seconds: float

    @property
    def images_per_second(self) -> float:
        return sum(w.images for w in self.windows) / sum(w.seconds for w in self.windows)

    @property
    def total_joules_per_image(self) -> float:
        """Mean over the windows, idle power included."""
        return float(np.mean([w.total_joules_per_image for w in self.windows]))

    @property
    def dynamic_joules_per_image(self) -> float:
        """Mean over the windows of what exceeds idle power."""
        return float(np.mean([w.dynamic_joules_per_image for w in self.windows]))

    @property
    def spread(self) -> float:
        """Standard deviation of the total energy over the windows, relative to its mean."""
        values = [w.total_joules_per_image for w in self.windows]
        return float(np.std(values, ddof=1) / np.mean(values)) if len(values) > 1 else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "source": self.source,
            "idle_watts": self.idle_watts,
            "total_joules_per_image": self.total_joules_per_image,
            "dynamic_joules_per_image": self.dynamic_joules_per_image,
            "images_per_second": self.images_per_second,
            "spread": self.spread,
            "tick_seconds": self.tick_seconds,
            "windows": len(self.windows),
        }


def load_trace(path: str | Path) -> PowerTrace:
    """Read a trace from JSON.

    Raises:
        GpuMeasurementError: not JSON, a list missing, or lists of unequal length.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        arrays = {
            key: np.asarray(content[key], np.float64)
            for key in ("seconds", "millijoules", "milliwatts")
        }
        trace = PowerTrace(str(content["device"]), **arrays)
        _check_readings(trace)
        return trace
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GpuMeasurementError(
            f"{path}: not a power trace ({type(error).__name__}: {error})"
        ) from error


def _check_readings(trace: PowerTrace) -> None:
    for readings in (trace.seconds, trace.millijoules, trace.milliwatts):
        if readings.ndim != 1 or not np.isfinite(readings).all():
            raise ValueError("a list of readings holds something that is no number")
    if len(trace.milliwatts) != len(trace.seconds) or (
        len(trace.millijoules) not in (0, len(trace.seconds))
    ):
        raise ValueError(
            f"{len(trace.seconds)} moments, {len(trace.millijoules)} readings of the counter, "
            f"{len(trace.milliwatts)} of the power"
        )


def evaluate(trace: PowerTrace, idle: Window, busy: list[Window]) -> GpuMeasurement:
    """Energy per image of the busy windows, in all and above the idle power.

    Raises:
        GpuMeasurementError: readings out of order, a counter that runs backwards, a window outside
            the trace or too short for the counter, or one without images.
    """
    seconds, joules, source = _cumulative(trace)
    idle_joules, _ = _energy(seconds, joules, idle)
    idle_watts = idle_joules / (idle.stop - idle.start)
    if not busy:
        raise GpuMeasurementError("no busy window: nothing was measured")
    windows = tuple(_window_energy(seconds, joules, window, idle_watts) for window in busy)
    tick_seconds = float(np.diff(seconds).mean())
    return GpuMeasurement(trace.device, idle_watts, windows, source, tick_seconds)


def _cumulative(trace: PowerTrace) -> tuple[Floats, Floats, str]:
    """Moments at which the energy is known, and the joules up to there."""
    if len(trace.seconds) < 2 or np.any(np.diff(trace.seconds) <= 0):
        raise GpuMeasurementError(
            f"{trace.device}: the {len(trace.seconds)} readings of the trace do not rise in time"
        )
    if not len(trace.millijoules):
        watts = trace.milliwatts / 1e3
        steps = np.diff(trace.seconds) * (watts[1:] + watts[:-1]) / 2
        return trace.seconds, np.concatenate([[0.0], np.cumsum(steps)]), "power"
    moves = np.diff(trace.millijoules)
    if np.any(moves < 0):
        at = trace.seconds[1:][moves < 0][0]
        raise GpuMeasurementError(
            f"{trace.device}: the energy counter runs backwards at {at:.3f} s; the driver was "
            "reloaded, measure again"
        )
    moved = np.flatnonzero(moves > 0) + 1
    if len(moved) < 2:
        raise GpuMeasurementError(f"{trace.device}: the energy counter does not move")
    return trace.seconds[moved], trace.millijoules[moved] / 1e3, "energy counter"


def _energy(seconds: Floats, joules: Floats, window: Window) -> tuple[float, int]:
    """Joules of a window, and how often the counter moved in it."""
    span = f"window {window.start:.3f} to {window.stop:.3f} s"
    if window.start >= window.stop or window.start < seconds[0] or window.stop > seconds[-1]:
        raise GpuMeasurementError(
            f"{span} is empty or outside the readings ({seconds[0]:.3f} to {seconds[-1]:.3f} s)"
        )
    ticks = int(np.count_nonzero((seconds >= window.start) & (seconds <= window.stop)))
    if ticks < MINIMUM_TICKS:
        raise GpuMeasurementError(
            f"{span}: the energy counter moved {ticks} times, at least {MINIMUM_TICKS} are needed; "
            "measure for several seconds"
        )
    start, stop = np.interp([window.start, window.stop], seconds, joules)
    return float(stop - start), ticks


def _window_energy(
    seconds: Floats, joules: Floats, window: Window, idle_watts: float
) -> WindowEnergy:
    if window.images < 1:
        raise GpuMeasurementError(
            f"window {window.start:.3f} to {window.stop:.3f} s: no image was processed in it"
        )
    energy, ticks = _energy(seconds, joules, window)
    length = window.stop - window.start
    return WindowEnergy(
        length,
        window.images,
        energy / window.images,
        (energy - idle_watts * length) / window.images,
        ticks,
    )


# --- measuring ---


class Meter(Protocol):
    """Reads one GPU."""

    device: str

    def read(self) -> tuple[float | None, float]:
        """Energy counter in mJ (None if the GPU has none) and power in mW."""
        ...


class NvmlMeter:
    """The first GPU that this process may see, through NVML (package nvidia-ml-py)."""

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handle = _visible_device(pynvml)
        name = pynvml.nvmlDeviceGetName(self._handle)
        self.device = name.decode() if isinstance(name, bytes) else str(name)

    def read(self) -> tuple[float | None, float]:
        power = float(self._nvml.nvmlDeviceGetPowerUsage(self._handle))
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)), power
        except self._nvml.NVMLError:  # before Volta there is no counter
            return None, power


def driver_version() -> str:
    """Version of the GPU's driver, through NVML."""
    import pynvml

    pynvml.nvmlInit()
    version = pynvml.nvmlSystemGetDriverVersion()
    return version.decode() if isinstance(version, bytes) else str(version)


def _visible_device(nvml: Any) -> Any:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(first))
    return nvml.nvmlDeviceGetHandleByUUID(first)


def gpu_problem() -> str | None:
    """Why a GPU cannot be measured here, in one line; None if it can."""
    try:
        NvmlMeter().read()
    except ModuleNotFoundError:
        return "no GPU measured: package nvidia-ml-py is not installed (extra `gpu`)"
    except Exception as error:  # NVML's own errors: no driver, no device, no permission
        return f"no GPU measured: NVML finds no GPU here ({error})"
    try:
        import torch
    except ModuleNotFoundError:
        return "no GPU measured: torch is not installed"
    if not torch.cuda.is_available():
        return "no GPU measured: this torch cannot use CUDA"
    return None


def measure(
    workload: Callable[[], int],
    meter: Meter,
    *,
    windows: int = WINDOWS,
    window_seconds: float = WINDOW_SECONDS,
    idle_seconds: float = IDLE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> tuple[PowerTrace, GpuMeasurement]:
    """Measure a workload: first the idle GPU, then several windows of work without a break.

    Args:
        workload: processes one batch to its end (waits for the GPU); returns its number of images.
        meter: reads the GPU.
        windows, window_seconds, idle_seconds: how long; a few seconds each.
        clock, pause: time and sleep.

    Raises:
        GpuMeasurementError: see `evaluate`.
    """
    recorder = _Recorder(meter, clock)
    recorder.watch(idle_seconds / 2, lambda: pause(POLL_SECONDS))  # until the clocks settle
    idle = recorder.watch(idle_seconds, lambda: pause(POLL_SECONDS))
    workload()
    busy = [recorder.watch(window_seconds, workload) for _ in range(windows)]
    recorder.watch(2 * window_seconds / MINIMUM_TICKS, lambda: pause(POLL_SECONDS))
    trace = recorder.trace()
    return trace, evaluate(trace, idle, busy)


class _Recorder:
    """Reads the meter between batches, at most once every `POLL_SECONDS`."""

    def __init__(self, meter: Meter, clock: Callable[[], float]) -> None:
        self.meter, self.clock = meter, clock
        self.readings: list[tuple[float, float | None, float]] = []
        self.begin = clock()

    def watch(self, seconds: float, work: Callable[[], int | None]) -> Window:
        start = now = self._poll()
        images = 0
        while now - start < seconds:
            images += work() or 0
            now = self._poll()
        return Window(start, now, images)

    def _poll(self) -> float:
        now = self.clock() - self.begin
        if not self.readings or now - self.readings[-1][0] >= POLL_SECONDS:
            self.readings.append((now, *self.meter.read()))
        return now

    def trace(self) -> PowerTrace:
        seconds, energies, powers = zip(*self.readings, strict=True)
        has_counter = None not in energies
        return PowerTrace(
            self.meter.device,
            np.array(seconds, np.float64),
            np.array(energies if has_counter else (), np.float64),
            np.array(powers, np.float64),
        )


def measure_graph(graph: Graph, images: npt.NDArray[np.uint8], batch: int) -> GpuMeasurement:
    """Measure a graph as a torch module on the GPU.

    Args:
        graph: the graph; a GPU computes it densely, whatever its gates say.
        images: uint8 [B, *input shape] or events [T, B, *input shape], repeated to fill the batch.
        batch: images at a time.

    Raises:
        GpuMeasurementError: no usable GPU; says why.
    """
    problem = gpu_problem()
    if problem:
        raise GpuMeasurementError(problem)
    import torch

    from export.torch_module import graph_to_torch

    axis = image_axis(graph, images)
    filled = select(images, axis, np.arange(batch) % images.shape[axis])
    try:
        module = graph_to_torch(graph).eval().cuda()
        pixels = module.prepare(filled).cuda()
        module(pixels)
    except torch.cuda.OutOfMemoryError as error:
        raise GpuMeasurementError(
            f"no GPU measured: batch {batch} does not fit its memory ({error})"
        ) from error

    def workload() -> int:
        with torch.no_grad():
            module(pixels)
        torch.cuda.synchronize()
        return batch

    return measure(workload, NvmlMeter())[1]


# --- modelling ---


@dataclass(frozen=True)
class GpuWork:
    """What a GPU has to do for one image: the dense network at every step.

    Attributes:
        macs: multiplications.
        weight_bytes: of all weights, read once per batch.
        value_bytes: of all values, written and read once each.
        nodes: nodes x time steps, the number of small kernels at batch 1 up to a factor.
        steps: T.
        int8: True if it may use the GPU's 8-bit rate (a quantised ANN).
    """

    macs: int
    weight_bytes: int
    value_bytes: int
    nodes: int
    steps: int
    int8: bool = False

    def one_pass(self) -> GpuWork:
        """The quantised ANN of the same shape: one pass for all steps, 8 bits for 32."""
        return replace(
            self,
            macs=self.macs // self.steps,
            weight_bytes=self.weight_bytes // 4,
            value_bytes=self.value_bytes // (4 * self.steps),
            nodes=self.nodes // self.steps,
            steps=1,
            int8=True,
        )


def gpu_work(graph: Graph) -> GpuWork:
    """Work of a quantised graph on a GPU in fp32."""
    plan = make_plan(graph)
    weighted = [n for n in graph.nodes if isinstance(n, Conv | Linear | Attention | Readout)]
    values = sum(math.prod(shape) for shape in plan.shapes.values())
    return GpuWork(
        macs=graph.steps * sum(dense_macs(plan, node) for node in weighted),
        weight_bytes=4 * sum(n.weight.size for n in weighted if not isinstance(n, Attention)),
        value_bytes=graph.steps * 8 * values,
        nodes=graph.steps * len(graph.nodes),
        steps=graph.steps,
    )


def modelled(work: GpuWork, profile: Profile, batch: int) -> tuple[float, float, Grade]:
    """Joules per image on a GPU by a roofline, (low, high), and the weakest grade in it.

    The time of a batch is the largest of arithmetic, memory and the overhead of its kernels; energy
    is that time at the power of batch 1 or of a busy board.

    Raises:
        ProfileError: not the profile of a GPU or a CPU.
    """
    gpu = profile.processor
    if gpu is None:
        raise ProfileError(f"profile '{profile.name}' is a {profile.kind}, a GPU is wanted here")
    peak = gpu.peak_int8 if work.int8 else gpu.peak_fp32
    power = gpu.single_power if batch == 1 else gpu.busy_power
    joules = []
    for best in (True, False):
        side = 1 if best else 0
        share = gpu.utilisation.range[side]
        arithmetic = 2 * work.macs * batch / (peak.range[side] * share)
        traffic = work.weight_bytes + work.value_bytes * batch
        memory = traffic / (gpu.memory_bandwidth.range[side] * share)
        kernels = work.nodes * gpu.operations_per_node.range[1 - side]
        overhead = kernels * gpu.operation_overhead.range[1 - side]
        watts = power.range[1 - side]
        joules.append(watts * max(arithmetic, memory, overhead) / batch)
    used = [peak, power, gpu.utilisation, gpu.memory_bandwidth]
    used += [gpu.operation_overhead, gpu.operations_per_node]
    return joules[0], joules[1], weakest([quantity.grade for quantity in used])
