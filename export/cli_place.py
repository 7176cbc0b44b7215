"""`atsnn-export profiles | place | cores | break-even | measure-gpu`: chips and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atsnn.tables import print_table
from export.cli_common import (
    DataOption,
    JsonOption,
    ModelArgument,
    choice,
    print_json,
    progress_report,
)  # fmt: skip

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from export.graph import Graph
    from hardware.gpu import GpuMeasurement
    from hardware.placement import Placement
    from hardware.placement.measure import PlacedEvents
    from hardware.placement.table import PlacedSystem

Register = Callable[[str], Callable[[Callable[..., None]], Callable[..., None]]]
_GPU_IMAGES = 64
"""Different images that a GPU is given, again and again."""
STRATEGY_CHOICES = ("auto", "channel-major", "token-major")

StrategyOption = Annotated[
    str,
    typer.Option(
        "--strategy",
        metavar="|".join(STRATEGY_CHOICES),
        help="channel-major stores weights once; token-major lets cores go dark; auto takes what "
        "costs less.",
    ),
]
ProfileOption = Annotated[
    str,
    typer.Option("--profile", metavar="NAME", help="Chip profile: a shipped one or a YAML file."),
]


def register(command: Register) -> None:
    """Add the commands of this module to the command line."""
    command("profiles")(profiles_command)
    command("place")(place_command)
    command("cores")(cores_command)
    command("break-even")(break_even_command)
    command("measure-gpu")(measure_gpu_command)


# --- profiles ---


def profiles_command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="A profile, or the path of a YAML file: all numbers."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the profiles of chips, conventions, GPUs and CPUs, or explain every number of one."""
    from hardware.placement.report import profile_table, profiles_table
    from hardware.profile import load_profile, profile_names

    names = profile_names() if name is None else (name,)
    profiles = [load_profile(each) for each in names]
    if as_json:
        content = [profile.model_dump(mode="json", exclude_none=True) for profile in profiles]
        print_json(content if name is None else content[0])
        return
    print_table(profiles_table() if name is None else profile_table(profiles[0]))


# --- place ---


def place_command(
    model: ModelArgument = None,
    profile: ProfileOption = "loihi2",
    strategy: StrategyOption = "auto",
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="A published shape, no checkpoint needed: spikformer-4-384, spikformer-8-768@224",
        ),
    ] = None,
    images: Annotated[
        int,
        typer.Option(
            "--images", min=0, metavar="N", help="Images to measure messages on; 0: none."
        ),
    ] = 32,
    cores: Annotated[bool, typer.Option("--cores", help="Also print every core.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw the mesh (.png, .svg or .pdf)."),
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a network on the cores of a chip: tables, lower bounds, traffic, a mesh."""
    from hardware.placement.picture import as_text, dark_of_cores, draw, load_of_cores
    from hardware.placement.report import cores_table, layers_table, traffic_lines

    graph, pixels = _to_place(model, preset, images, data)
    placement = _placement(graph, pixels, profile, strategy)
    events = _dark(placement, pixels)
    if picture is not None:
        draw(placement, picture, events)
    if as_json:
        content = placement.as_json()
        if cores:
            content["cores"] = placement.cores_json()
        if events is not None:
            content["core_steps_dark"] = events.dark_share
        content["picture"] = str(picture) if picture else None
        print_json(content)
        return
    print_table(layers_table(placement))
    if cores:
        print_table(cores_table(placement))
    for line in (*traffic_lines(placement), *(f"note: {note}" for note in _notes(placement))):
        print(line)
    print(f"placed in {placement.seconds:.1f} s; the mesh by load, ' ' empty to '@' full:")
    print(as_text(placement, load_of_cores(placement)))
    if events is not None:
        print(f"core-steps dark: {events.dark_share:.1%}; by core, ' ' never to '@' always:")
        print(as_text(placement, dark_of_cores(events)))
    if picture is not None:
        print(f"picture: {picture}")


def _notes(placement: Placement) -> list[str]:
    from hardware.placement.place import notes

    return notes(placement)


def _to_place(
    model: Path | None, preset: str | None, images: int, data: str | None
) -> tuple[Graph, npt.NDArray[np.uint8] | None]:
    from hardware.errors import PlacementError

    if preset is not None:
        if model is not None or data is not None:
            raise PlacementError(
                "--preset is a shape without weights: it takes neither a MODEL nor --data"
            )
        from hardware.placement.presets import preset_graph

        return preset_graph(preset), None
    from export.built_in import load_images, load_subject
    from export.passes import Schedule

    graph = load_subject(model).graph
    if not graph.depth:
        graph = Schedule()(graph)
    return graph, load_images(graph, images, data).pixels if images else None


def _placement(
    graph: Graph, pixels: npt.NDArray[np.uint8] | None, profile: str, strategy: str
) -> Placement:
    from hardware.placement import place

    chosen = choice("--strategy", strategy, STRATEGY_CHOICES)
    with progress_report() as report:
        return place(graph, profile, chosen, images=pixels, progress=report)


def _dark(placement: Placement, pixels: npt.NDArray[np.uint8] | None) -> PlacedEvents | None:
    from hardware.placement import measure

    return None if pixels is None else measure(placement, pixels)


# --- energy on cores ---


def cores_command(
    model: ModelArgument = None,
    profile: ProfileOption = "loihi1_calibrated",
    strategy: StrategyOption = "auto",
    images: Annotated[
        int, typer.Option("--images", min=1, metavar="N", help="The first N test images.")
    ] = 128,
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            metavar="auto|measured|modelled|none",
            help="GPU rows: measured by NVML where there is one (auto), or from a GPU profile.",
        ),
    ] = "auto",
    gpu_profile: Annotated[
        list[str] | None,
        typer.Option("--gpu-profile", metavar="NAME", help="GPU or CPU to model; may be repeated."),
    ] = None,
    gpu_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--gpu-file", metavar="FILE", help="Measurement made elsewhere, with provenance (JSON)."
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also energy by layer and cause.")
    ] = False,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Energy, latency and dark cores after placement: all tokens, halting, merging, rivals."""
    from hardware.engine import image_axis, select
    from hardware.gpu_import import load_measurements
    from hardware.neurobench import neurobench
    from hardware.placement.report import energy_placed_table, rivals_table
    from hardware.placement.table import placed_table

    chosen = choice("--strategy", strategy, STRATEGY_CHOICES)
    wanted = choice("--gpu", gpu, ("auto", "measured", "modelled", "none"))
    measured = tuple(m for file in gpu_file or () for m in load_measurements(file))
    graph, pixels = _to_place(model, None, images, data)
    assert pixels is not None  # at least one image
    with progress_report() as report:
        table = placed_table(
            graph,
            pixels,
            profile=profile,
            strategy=chosen,
            gpu=wanted,
            gpu_profiles=tuple(gpu_profile or ("a100", "xeon-8380")),
            imported=measured,
            progress=report,
        )
    if as_json:
        few = select(pixels, image_axis(graph, pixels), slice(0, 64))
        print_json({**table.as_json(), "neurobench": neurobench(graph, few)})
        return
    print(f"GPU rows: {table.gpu_line}")
    print_table(energy_placed_table(table))
    if layers:
        for system in table.systems:
            print_table(_layers(system))
    print_table(rivals_table(table.rivals))


def _layers(system: PlacedSystem) -> Any:
    from hardware.placement.report import system_layers_table

    return system_layers_table(system)


# --- break-even ---


def break_even_command(
    model: ModelArgument = None,
    profile: Annotated[
        list[str] | None,
        typer.Option("--profile", metavar="NAME", help="Chip profile; may be repeated."),
    ] = None,
    images: Annotated[
        int, typer.Option("--images", min=1, metavar="N", help="The first N test images.")
    ] = 64,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Plot (.png, .svg or .pdf).")
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """At which firing rate, token share and batch a chip wins against GPUs, a CPU and an ANN."""
    from hardware.placement.break_even import break_even, plot
    from hardware.placement.report import break_even_table
    from hardware.placement.table import RIVAL_GPUS, placed_system

    graph, pixels = _to_place(model, None, images, data)
    assert pixels is not None  # at least one image
    chips = tuple(profile or ("loihi1", "loihi1_calibrated", "loihi2"))
    with progress_report() as report:
        systems = tuple(
            placed_system("the network", graph, pixels, chip, progress=report) for chip in chips
        )
    lines = {system.placement.profile.name: break_even(system) for system in systems}
    if picture is not None:
        plot(systems, RIVAL_GPUS, str(picture))
    if as_json:
        content = {chip: [line.as_json() for line in found] for chip, found in lines.items()}
        print_json({"chips": content, "picture": str(picture) if picture else None})
        return
    for found in lines.values():
        print_table(break_even_table(found))
    if picture is not None:
        print(f"picture: {picture}")


# --- a GPU that another machine has ---


def measure_gpu_command(
    model: ModelArgument = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Measurement to write (JSON).")
    ] = None,
    measured_by: Annotated[
        str, typer.Option("--by", metavar="NAME", help="Who measures; goes into the provenance.")
    ] = "",
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, metavar="N", help="Images at a time; may be repeated."),
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the network on this machine's GPU, for `cores --gpu-file` on another machine."""
    from datetime import date

    from hardware.errors import GpuMeasurementError
    from hardware.gpu import driver_version, measure_graph
    from hardware.gpu_import import Provenance, save_measurements

    if out is None or not measured_by.strip():
        raise GpuMeasurementError(
            "a measurement needs a file and a name: give --out FILE and --by NAME (the name of "
            "who measures is part of the provenance, without which nobody imports it)"
        )
    sizes = sorted(set(batch or (1, 64)))
    graph, pixels = _to_place(model, None, min(max(sizes), _GPU_IMAGES), data)
    assert pixels is not None  # at least one image
    found: dict[int, GpuMeasurement] = {}
    with progress_report() as report:
        for done, size in enumerate(sizes):
            report("GPU", done, len(sizes))
            found[size] = measure_graph(graph, pixels, size)
        report("GPU", len(sizes), len(sizes))
    network = str(model) if model else "the built-in model"
    sizes_given = " ".join(f"--batch {size}" for size in sizes)
    provenance = Provenance(
        measured_by=measured_by.strip(),
        date=date.today().isoformat(),
        device=next(iter(found.values())).device,
        driver=driver_version(),
        command=f"atsnn-export measure-gpu {model or ''} {sizes_given}".replace("  ", " "),
        network=network,
    )
    save_measurements(out, found, provenance)
    if as_json:
        measurements = {size: measured.as_json() for size, measured in found.items()}
        print_json({"file": str(out), "batches": measurements})
        return
    for size, measured in found.items():
        print(
            f"batch {size}: {measured.total_joules_per_image:.4g} J per image in all, "
            f"{measured.dynamic_joules_per_image:.4g} J without idle power, "
            f"{measured.images_per_second:,.0f} images/s, spread {measured.spread:.1%}"
        )
    print(f"wrote {out}")
