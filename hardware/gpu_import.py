"""GPU measurements that were made elsewhere: a JSON file, which counts only with its provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from atsnn.files import write_atomically
from hardware.energy import EnergyRow
from hardware.errors import GpuMeasurementError
from hardware.gpu import GpuMeasurement

MAX_BYTES = 10_000_000


class Provenance(BaseModel):
    """Where a measurement comes from. All of it is needed, or nobody can repeat it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measured_by: str = Field(min_length=1)
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    device: str = Field(min_length=1)
    driver: str = Field(min_length=1)
    command: str = Field(min_length=1)
    network: str = Field(min_length=1)


class ImportedMeasurement(BaseModel):
    """Energy of one network on one GPU at one batch size; joules per image.

    Attributes:
        batch: images at a time. windows: how many, of how many `window_seconds`.
        total_joules_per_image: idle power included. dynamic_joules_per_image: without it.
        idle_watts: of the board at rest. spread: standard deviation over the windows / mean.
        source: "energy counter" or "power".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    batch: int = Field(ge=1)
    windows: int = Field(ge=1)
    window_seconds: float = Field(gt=0)
    total_joules_per_image: float = Field(gt=0)
    dynamic_joules_per_image: float
    idle_watts: float = Field(ge=0)
    images_per_second: float = Field(gt=0)
    spread: float = Field(ge=0)
    source: str = Field(min_length=1)
    provenance: Provenance

    @model_validator(mode="after")
    def _adds_up(self) -> ImportedMeasurement:
        idle = self.idle_watts / self.images_per_second
        expected = self.total_joules_per_image - idle
        if abs(expected - self.dynamic_joules_per_image) > 0.02 * self.total_joules_per_image:
            raise ValueError(
                f"dynamic_joules_per_image is {self.dynamic_joules_per_image:.6g}, but total less "
                f"idle power over rate is {expected:.6g}: the figures are not of one measurement"
            )
        return self


def load_measurements(path: str | Path) -> tuple[ImportedMeasurement, ...]:
    """Read one measurement, or a list of them.

    Raises:
        GpuMeasurementError: not such a file, or one without provenance; names file and field.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise GpuMeasurementError(
                f"{file}: {file.stat().st_size:,} bytes; this is no measurement"
            )
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GpuMeasurementError(f"{file}: cannot be read ({type(error).__name__})") from error
    entries = content if isinstance(content, list) else [content]
    if not entries:
        raise GpuMeasurementError(f"{file}: holds no measurement")
    return tuple(_parse(entry, f"{file}, measurement {i + 1}") for i, entry in enumerate(entries))


def _parse(entry: Any, where: str) -> ImportedMeasurement:
    if not isinstance(entry, dict):
        raise GpuMeasurementError(f"{where}: is {type(entry).__name__}, not a mapping of fields")
    if not entry.get("provenance"):
        fields = ", ".join(Provenance.model_fields)
        raise GpuMeasurementError(
            f"{where}: no provenance; a number that nobody can trace is not shown beside others: "
            f"add provenance with {fields}"
        )
    try:
        return ImportedMeasurement.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the measurement"
        message = first["msg"].removeprefix("Value error, ")
        raise GpuMeasurementError(f"{where}: {field}: {message}") from error


def save_measurements(
    path: str | Path, measurements: Mapping[int, GpuMeasurement], provenance: Provenance
) -> None:
    """Write measurements, by batch size, for use elsewhere."""
    records = [
        ImportedMeasurement(
            batch=batch,
            windows=len(measured.windows),
            window_seconds=sum(w.seconds for w in measured.windows) / len(measured.windows),
            total_joules_per_image=measured.total_joules_per_image,
            dynamic_joules_per_image=measured.dynamic_joules_per_image,
            idle_watts=measured.idle_watts,
            images_per_second=measured.images_per_second,
            spread=measured.spread,
            source=measured.source,
            provenance=provenance,
        ).model_dump(mode="json")
        for batch, measured in measurements.items()
    ]
    write_atomically(Path(path), json.dumps(records, indent=2).encode())


def imported_rows(measurements: tuple[ImportedMeasurement, ...], macs: float) -> list[EnergyRow]:
    """Rows of the energy table; total board energy, the dynamic part in the note."""
    return [
        EnergyRow(
            f"{entry.provenance.network}, on a GPU, batch {entry.batch}",
            f"{entry.provenance.device}, {entry.source}, total board energy (measured elsewhere)",
            "measured",
            entry.total_joules_per_image,
            0.0,
            macs,
            entry.total_joules_per_image * (1 - entry.spread),
            entry.total_joules_per_image * (1 + entry.spread),
            f"dynamic {entry.dynamic_joules_per_image:.3g} J, idle {entry.idle_watts:.1f} W, "
            f"{entry.windows} windows of {entry.window_seconds:.1f} s, measured by "
            f"{entry.provenance.measured_by} on {entry.provenance.date} "
            f"(driver {entry.provenance.driver}): {entry.provenance.command}",
        )
        for entry in measurements
    ]
