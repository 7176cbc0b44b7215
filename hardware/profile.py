"""Profiles of chips, conventions, GPUs and CPUs: numbers that each carry unit, source and grade.

A profile is a YAML file. Every number is written as

    {value: 23.6, unit: pJ, source: "Davies et al. 2018, table 2", grade: simulated}

or, where only a range is known, with `low` and `high` in place of `value`. The loader refuses a
number without unit, source or grade, a unit of the wrong kind, and a field that it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hardware.errors import ProfileError

Grade = Literal["measured", "simulated", "derived", "assumed"]
GRADES: tuple[Grade, ...] = get_args(Grade)
"""From the strongest to the weakest."""

_PREFIXES = {"f": 1e-15, "p": 1e-12, "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0}
_JOULES = {f"{prefix}J": factor for prefix, factor in _PREFIXES.items()}
_SECONDS = {f"{prefix}s": factor for prefix, factor in _PREFIXES.items()}
_UNITS: dict[str, dict[str, float]] = {
    "energy": _JOULES,
    "time": _SECONDS,
    "power": {"mW": 1e-3, "W": 1.0},
    "rate": {"GFLOP/s": 1e9, "TFLOP/s": 1e12, "GOP/s": 1e9, "TOP/s": 1e12},
    "bandwidth": {"GB/s": 1e9, "TB/s": 1e12},
    "ratio": {"1": 1.0},
    "count": {
        "cores": 1, "neurons": 1, "axons": 1, "bits": 1, "bytes": 1, "KiB": 1024, "operations": 1,
        "tiles": 1, "steps": 1, "slots": 1,
    },
}  # fmt: skip


def weakest(grades: Iterable[Grade]) -> Grade:
    """The weakest of several grades; "measured" if there are none."""
    return GRADES[max((GRADES.index(grade) for grade in grades), default=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Quantity(_Strict):
    """A number with its origin: a `value`, or a range from `low` to `high`, never both."""

    value: float | None = Field(None, ge=0)
    low: float | None = Field(None, ge=0)
    high: float | None = Field(None, ge=0)
    unit: str
    source: str = Field(min_length=1)
    grade: Grade

    @model_validator(mode="after")
    def _value_or_range(self) -> Quantity:
        bounds = (self.low, self.high)
        if (self.value is None) == (bounds == (None, None)) or (
            self.value is None and None in bounds
        ):
            raise ValueError("give either value, or both low and high")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if not any(self.unit in units for units in _UNITS.values()):
            known = ", ".join(unit for units in _UNITS.values() for unit in units)
            raise ValueError(f"unknown unit '{self.unit}'; known are {known}")
        return self

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest value in SI units (joules, seconds, watts, operations/s, bytes/s)."""
        factor = next(units[self.unit] for units in _UNITS.values() if self.unit in units)
        low = self.value if self.value is not None else self.low
        high = self.value if self.value is not None else self.high
        assert low is not None
        assert high is not None
        return low * factor, high * factor

    @property
    def middle(self) -> float:
        """The value in SI units; of a range, its geometric middle."""
        low, high = self.range
        return low if low == high else math.sqrt(low * high)


class EnergyPrices(_Strict):
    """Energy of one event. Which of them a profile has decides what its energy is made of.

    With `synaptic_operation`, every SOP costs that (in a convolution `convolution_operation`, if
    there is such a price); else additions and MACs cost `accumulate` and `multiply_accumulate`.
    Neuron updates and spikes cost nothing where no price is given. The prices of traffic (messages,
    hops, chip crossings) count once a network is placed (`hardware.placement`): a message is a
    spike that one core sends to one other core, or to itself.
    """

    synaptic_operation: Quantity | None = None
    convolution_operation: Quantity | None = None
    accumulate: Quantity | None = None
    multiply_accumulate: Quantity | None = None
    neuron_update_active: Quantity | None = None
    neuron_update_idle: Quantity | None = None
    spike: Quantity | None = None
    message_out: Quantity | None = None
    message_in: Quantity | None = None
    spike_within_tile: Quantity | None = None
    hop_east_west: Quantity | None = None
    hop_north_south: Quantity | None = None
    chip_crossing: Quantity | None = None


class Latencies(_Strict):
    """Time of one event on its core, of one hop, and of the barrier that ends every time step.

    Events that a profile gives no time for take none. A range of `barrier` spans a chip with one
    busy tile and one with all of them busy.
    """

    synaptic_operation: Quantity | None = None
    convolution_operation: Quantity | None = None
    neuron_update_active: Quantity | None = None
    neuron_update_idle: Quantity | None = None
    spike: Quantity | None = None
    message_out: Quantity | None = None
    message_in: Quantity | None = None
    hop_east_west: Quantity | None = None
    hop_north_south: Quantity | None = None
    chip_crossing: Quantity | None = None
    barrier: Quantity | None = None


class ChipPower(_Strict):
    """Power that a chip draws whatever it computes."""

    static_per_chip: Quantity | None = None


class Limits(_Strict):
    """What one chip and one of its cores hold."""

    cores: Quantity | None = None
    neurons_per_core: Quantity | None = None
    in_axons_per_core: Quantity | None = None
    out_axons_per_core: Quantity | None = None
    synapse_memory_per_core: Quantity | None = None
    synapse_word: Quantity | None = None
    """Synapse memory is taken in words of so many bits, a list of weights at a time."""
    out_axon_slots: Quantity | None = None
    """Slots that the out-axon of a group of neurons takes, per group and target core."""
    delay_steps: Quantity | None = None
    """Longest time that a message can be held, in steps."""
    weight_bits: Quantity | None = None
    graded_spike_bits: Quantity | None = None
    """0: the chip has unit spikes only."""
    cores_per_tile: Quantity | None = None
    mesh_columns: Quantity | None = None
    mesh_rows: Quantity | None = None
    """Tiles of one chip, east-west and north-south. Without them: one core a tile, a square."""


class GpuFigures(_Strict):
    """What the roofline of a GPU or a CPU needs.

    Attributes:
        peak_fp32, peak_fp16, peak_int8: operations per second (a MAC is two).
        memory_bandwidth: bytes per second.
        utilisation: share of the peak that a large batch reaches.
        operation_overhead: time that one small kernel takes at batch 1, whatever it computes.
        operations_per_node: kernels per node and time step.
        idle_power, single_power, busy_power: of the board at rest, at batch 1, at a large batch.
        board_power: the most that the board may draw.
    """

    peak_fp32: Quantity
    peak_fp16: Quantity | None = None
    peak_int8: Quantity
    memory_bandwidth: Quantity
    utilisation: Quantity
    operation_overhead: Quantity
    operations_per_node: Quantity
    idle_power: Quantity
    single_power: Quantity
    busy_power: Quantity
    board_power: Quantity | None = None


_PROCESSOR = {
    "peak_fp32": "rate",
    "peak_fp16": "rate",
    "peak_int8": "rate",
    "memory_bandwidth": "bandwidth",
    "utilisation": "ratio",
    "operation_overhead": "time",
    "operations_per_node": "count",
    "idle_power": "power",
    "single_power": "power",
    "busy_power": "power",
    "board_power": "power",
}
_DIMENSIONS: dict[str, dict[str, str]] = {
    "energy": dict.fromkeys(EnergyPrices.model_fields, "energy"),
    "time": dict.fromkeys(Latencies.model_fields, "time"),
    "power": dict.fromkeys(ChipPower.model_fields, "power"),
    "limits": dict.fromkeys(Limits.model_fields, "count"),
    "gpu": _PROCESSOR,
    "cpu": _PROCESSOR,
}


def _check_operations(prices: EnergyPrices) -> None:
    """Every operation has one price: that of a SOP, or those of additions and of MACs."""
    per_sop = prices.synaptic_operation is not None
    halves = [prices.accumulate is not None, prices.multiply_accumulate is not None]
    if per_sop == any(halves) or any(halves) != all(halves):
        raise ValueError(
            "energy prices operations by synaptic_operation, or by accumulate and "
            "multiply_accumulate together"
        )
    if prices.convolution_operation is not None and not per_sop:
        raise ValueError("convolution_operation needs synaptic_operation beside it")


class Profile(_Strict):
    """One chip, convention, GPU or CPU.

    Attributes:
        name: short name, as on the command line.
        kind: chip, convention, gpu or cpu.
        convention: the words that stand beside every joule computed from it.
        note: what the reader must know, in one or two sentences.
    """

    name: str = Field(min_length=1)
    kind: Literal["chip", "convention", "gpu", "cpu"]
    convention: str = Field(min_length=1)
    note: str = ""
    energy: EnergyPrices = EnergyPrices()
    time: Latencies = Latencies()
    power: ChipPower = ChipPower()
    limits: Limits = Limits()
    gpu: GpuFigures | None = None
    cpu: GpuFigures | None = None

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Profile:
        for kind, figures in (("gpu", self.gpu), ("cpu", self.cpu)):
            if (self.kind == kind) != (figures is not None):
                raise ValueError(
                    f"a profile of kind {kind} has a section {kind}, and no other kind has one"
                )
        if self.processor is None:
            if not any(quantity for _, quantity in self.energy):
                raise ValueError("it prices no event: give at least one number under energy")
            _check_operations(self.energy)
        for section, field, quantity in self.quantities():
            known = _UNITS[_DIMENSIONS[section][field]]
            if quantity.unit not in known:
                raise ValueError(
                    f"{field} has unit '{quantity.unit}'; use one of {', '.join(known)}"
                )
        return self

    @property
    def processor(self) -> GpuFigures | None:
        """The figures of a GPU or a CPU; None for a chip or a convention."""
        return self.gpu or self.cpu

    def quantities(self) -> Iterator[tuple[str, str, Quantity]]:
        """Every number of the profile: (section, field, quantity)."""
        for section in _DIMENSIONS:
            for field, quantity in getattr(self, section) or ():
                if quantity is not None:
                    yield section, field, quantity


def profile_names(kind: str | None = None) -> tuple[str, ...]:
    """Names of the shipped profiles, sorted; of one kind if given."""
    names = sorted(
        file.name.removesuffix(".yaml")
        for file in _folder().iterdir()
        if file.name.endswith(".yaml")
    )
    return tuple(name for name in names if kind is None or load_profile(name).kind == kind)


def load_profile(name: str | Path) -> Profile:
    """Load a shipped profile by name, or a YAML file by its path.

    Raises:
        ProfileError: no such profile, not YAML, or a number without value, unit, source or grade;
            names the file and the field.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return _parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"{path}: cannot be read ({error})") from error
    file = _folder() / f"{name}.yaml"
    if not file.is_file():
        raise ProfileError(
            f"no profile named '{name}'; there are {', '.join(_shipped())}, or give the path of a "
            ".yaml file"
        )
    return _parse(file.read_text(encoding="utf-8"), file.name)


def _folder() -> Any:
    return resources.files("hardware") / "profiles"


def _shipped() -> list[str]:
    return sorted(
        f.name.removesuffix(".yaml") for f in _folder().iterdir() if f.name.endswith(".yaml")
    )


def _parse(text: str, file: str) -> Profile:
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates, depth
        raise ProfileError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ProfileError(
            f"{file}: a profile is a mapping of fields, not {type(content).__name__}"
        )
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the profile"
        message = first["msg"].removeprefix("Value error, ")
        raise ProfileError(f"{file}: {field}: {message}") from error
