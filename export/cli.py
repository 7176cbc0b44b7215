"""`atsnn-export graph | lava | onnx | verify | run | energy | demo`; more in `export/cli_*.py`."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import typer
from rich.table import Table

from atsnn.errors import AtsnnError
from atsnn.tables import print_table
from export.cli_common import (
    DataOption,
    ImagesOption,
    JsonOption,
    ModelArgument,
    Report,
    choice,
    print_json,
    progress_report,
    write_text,
)  # fmt: skip
from export.cli_exits import register as register_exits
from export.cli_place import register as register_place
from export.errors import LavaUnavailableError, UnsupportedTargetError

if TYPE_CHECKING:
    from export.built_in import Images, Subject
    from export.graph import Graph
    from export.passes import LayerRounding
    from hardware.energy import EnergyTable
    from hardware.verify import Stage, VerificationResult

LAVA_STAGES = ("lava-layers", "lava-blocks")
IN_PROCESS_STAGES = tuple(f"{name}-inprocess" for name in LAVA_STAGES)
STAGES = ("engine", *LAVA_STAGES, *IN_PROCESS_STAGES, "torch", "onnx", "netx")
BACKENDS = ("engine", "torch", *LAVA_STAGES, "onnx")

app = typer.Typer(
    help="From a trained model to a spike-exact neuromorphic network. Without MODEL every command "
    "takes the built-in one and its images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Command = TypeVar("Command", bound=Callable[..., None])

GpuOption = Annotated[
    str,
    typer.Option(
        "--gpu",
        metavar="auto|measured|modelled|none",
        help="GPU rows: measured by NVML where there is one (auto), or from a GPU profile.",
    ),
]


def main() -> None:
    """Entry point of `atsnn-export`."""
    app()


def command(name: str) -> Callable[[Command], Command]:
    """Register a command whose errors end in one line on stderr: 1 for an error, 130 for Ctrl-C."""

    def register(function: Command) -> Command:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
                sys.stdout.flush()
            except AtsnnError as error:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                raise typer.Exit(1) from None
            except ModuleNotFoundError as error:  # a graph file needs no torch, models do
                print(f"error: this needs {error.name}, which is not installed", file=sys.stderr)
                raise typer.Exit(1) from None
            except KeyboardInterrupt:
                print("error: interrupted", file=sys.stderr)
                raise typer.Exit(130) from None
            except BrokenPipeError:  # whoever read our output has had enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(1) from None

        app.command(name)(run)
        return function

    return register


# --- graph ---


@command("graph")
def graph_command(
    model: ModelArgument = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the graph here (.h5).")
    ] = None,
    float_graph: Annotated[
        bool, typer.Option("--float", help="The graph as captured, before quantisation.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Capture a model as a graph, quantise and schedule it, and say what was rounded."""
    from export.built_in import GRAPH_SUFFIXES
    from export.formats import hdf5
    from export.validation import validate

    if out is not None and out.suffix not in GRAPH_SUFFIXES:
        raise typer.BadParameter(
            f"{out}: a graph file is named *.h5, by which commands know it", param_hint="--out"
        )
    subject = _subject(model)
    graph, rounding = _captured(subject, float_graph)
    validate(graph)
    if out is not None:
        hdf5.save(graph, out)
    summary = _graph_summary(subject, graph, rounding)
    if as_json:
        print_json({**summary, "file": str(out) if out else None})
        return
    print_table(_graph_table(graph, summary))
    if rounding:
        print_table(_rounding_table(rounding))
    if out is not None:
        print(f"graph: {out} ({out.stat().st_size:,} bytes)")


def _captured(subject: Subject, float_graph: bool) -> tuple[Graph, tuple[LayerRounding, ...]]:
    if subject.model is None:
        if float_graph:
            raise UnsupportedTargetError(
                f"{subject.name} is a quantised graph; --float needs the checkpoint it came from"
            )
        return subject.graph, ()
    from export.passes import FoldNorm, Quantize
    from export.spikformer import capture_spikformer

    captured = capture_spikformer(subject.model)
    if float_graph:
        return captured, ()
    bits = subject.model.config.quantization
    passing = Quantize(bits.pixel_bits, bits.fraction_bits)
    return subject.graph, passing.report(FoldNorm()(captured))


def _graph_summary(
    subject: Subject, graph: Graph, rounding: tuple[LayerRounding, ...]
) -> dict[str, Any]:
    from export.formats.hdf5 import content_digest
    from export.graph import LIF
    from export.shapes import shapes

    sizes = shapes(graph)
    nodes = [
        {
            "name": node.name,
            "kind": node.kind,
            "source": node.source,
            "shape": list(sizes[node.name, node.outputs[0]]),
            "depth": graph.depth.get(node.name),
            "block": graph.blocks.get(node.name),
        }
        for node in graph.nodes
    ]
    weights = [getattr(node, "weight", None) for node in graph.nodes]
    return {
        "model": subject.name,
        "quantized": graph.quantized,
        "steps": graph.steps,
        "fraction_bits": graph.fraction_bits,
        "nodes": nodes,
        "edges": len(graph.edges),
        "weights": sum(w.size for w in weights if w is not None),
        "neurons": sum(int(np.prod(sizes[n.name, "out"])) for n in graph.of_kind(LIF)),
        "latency": max(graph.depth.values(), default=None),
        "sha256": content_digest(graph),
        "rounding": [layer.as_json() for layer in rounding],
    }


def _graph_table(graph: Graph, summary: dict[str, Any]) -> Table:
    title = (
        f"{summary['model']}: {len(graph.nodes)} nodes, {summary['edges']} edges, "
        f"{summary['weights']:,} weights, {summary['neurons']:,} neurons, T = {graph.steps}"
    )
    table = _table(title, ["node", "kind", "block"], ["shape", "depth"])
    for node in summary["nodes"]:
        shape = "x".join(str(n) for n in node["shape"])
        depth = "" if node["depth"] is None else str(node["depth"])
        table.add_row(node["name"], node["kind"], node["block"] or "", shape, depth)
    return table


def _rounding_table(rounding: tuple[LayerRounding, ...]) -> Table:
    heads = ["weight bits", "weight error", "to zero", "bias error", "threshold error"]
    heads += ["headroom", "of membrane"]
    table = _table("Rounding (errors relative; headroom: capacity / largest activation)", [], [])
    table.add_column("synapse")
    for head in heads:
        table.add_column(head, justify="right")
    for layer in rounding:
        table.add_row(
            layer.node,
            str(layer.weight_bits or "counts"),
            f"{layer.weight_error:.2%}",
            f"{layer.zeroed:.2%}",
            f"{layer.bias_error:.3%}",
            f"{layer.threshold_error:.3%}",
            f"{layer.headroom:.3g}x",
            f"{layer.membrane_headroom:.3g}x",
        )
    return table


# --- lava ---


@command("lava")
def lava_command(
    model: ModelArgument = None,
    grain: Annotated[
        str,
        typer.Option(
            "--grain",
            metavar="layers|blocks",
            help="One Lava process per layer, or one per block.",
        ),
    ] = "layers",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the description here, as JSON."),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Also run it, in a watched child interpreter.")
    ] = False,
    images: ImagesOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build the Lava process network, describe it, and run it if asked."""
    from export.lava import check_lava

    chosen = choice("--grain", grain, ("layers", "blocks"))
    check_lava()
    subject = _subject(model)
    description = _lava_description(subject, chosen)
    if run:
        tested = _images(subject.graph, images or 8, data)
        start = time.monotonic()
        with progress_report() as report:
            logits = _backend(subject, f"lava-{chosen}", report)(tested.pixels)["logits"]
        description["run"] = _outcome(logits, tested, time.monotonic() - start)
    if out is not None:
        write_text(out, json.dumps(description, indent=1))
    if as_json:
        print_json(description)
        return
    print_table(_lava_table(description))
    if run:
        _print_outcome(description["run"])
    if out is not None:
        print(f"description: {out}")


def _lava_description(subject: Subject, grain: str) -> dict[str, Any]:
    from export.lava.network import hardware_steps, prepare
    from export.lava.partition import partition

    graph = prepare(subject.graph)
    blocks = [
        {
            "block": part.label,
            "nodes": [
                {"name": node.name, "kind": node.kind, "depth": graph.depth[node.name]}
                for node in part.nodes
            ],
            "in_ports": len(part.sources),
            "out_ports": len(part.sinks),
        }
        for part in partition(graph)
    ]
    return {
        "model": subject.name,
        "grain": grain,
        "blocks": blocks,
        "time_steps_per_image": graph.steps,
        "latency": hardware_steps(graph, 0),
    }


def _lava_table(description: dict[str, Any]) -> Table:
    title = (
        f"{description['model']} on Lava, grain {description['grain']}: an image every "
        f"{description['time_steps_per_image']} time steps, latency {description['latency']}"
    )
    table = _table(title, ["block"], ["nodes", "in-ports", "out-ports"])
    table.add_column("kinds")
    for block in description["blocks"]:
        kinds = [node["kind"] for node in block["nodes"]]
        counted = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
        table.add_row(
            block["block"],
            str(len(kinds)),
            str(block["in_ports"]),
            str(block["out_ports"]),
            counted,
        )
    return table


# --- onnx ---


@command("onnx")
def onnx_command(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The ONNX file to write.")],
    model: ModelArgument = None,
    spikes: Annotated[
        bool, typer.Option("--spikes", help="Also output the spikes of every layer.")
    ] = False,
    images: Annotated[
        int,
        typer.Option(
            "--images", min=0, metavar="N", help="Compare with torch on N images (0: do not)."
        ),
    ] = 16,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the whole adaptive model as ONNX and compare onnxruntime with torch."""
    from export.formats.onnx import onnx_trace, save_onnx

    subject = _subject(model)
    tested = _images(subject.graph, images, data) if images else None
    events = tested.events if tested else subject.events
    save_onnx(subject.graph, out, spikes=spikes, events=events)
    result: dict[str, Any] = {"file": str(out), "bytes": out.stat().st_size, "images": images}
    if tested:
        ours, theirs = _reference(subject)(tested.pixels), onnx_trace(out, tested.pixels)
        result |= {
            "images": len(tested),
            "largest_logit_difference": float(
                np.abs(ours["logits"] - theirs["logits"]).max(initial=0.0)
            ),
            "classes_differing": int(np.count_nonzero(_classes(ours) != _classes(theirs))),
            "spikes_and_gates_compared": sum(v.size for k, v in theirs.items() if k in ours)
            - theirs["logits"].size,
            "spikes_and_gates_differing": sum(
                int(np.count_nonzero(value != ours[key]))
                for key, value in theirs.items()
                if key != "logits"
            ),
        }
    if as_json:
        print_json(result)
    else:
        _print_onnx(result)
    if result.get("classes_differing") or result.get("spikes_and_gates_differing"):
        raise typer.Exit(1)


def _print_onnx(result: dict[str, Any]) -> None:
    print(f"onnx: {result['file']} ({result['bytes']:,} bytes)")
    if result["images"]:
        print(
            f"onnxruntime against torch, {result['images']} images: largest difference of a logit "
            f"{result['largest_logit_difference']:.2g}, classes differing "
            f"{result['classes_differing']}, gates and spikes differing "
            f"{result['spikes_and_gates_differing']} of {result['spikes_and_gates_compared']:,}"
        )


# --- verify ---


@command("verify")
def verify_command(
    model: ModelArgument = None,
    images: Annotated[
        int, typer.Option("--images", min=1, metavar="N", help="The first N test images.")
    ] = 64,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="STAGES",
            help=f"Comma-separated: {', '.join(STAGES)}. The engine is compared with quantised "
            "torch, every other stage with the engine.",
        ),
    ] = "engine,lava-layers,lava-blocks",
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every spike of every layer at every step; exit status 1 if one differs."""
    stages = [choice("--against", name.strip(), STAGES) for name in against.split(",")]
    subject = _subject(model)
    result = _verified(subject, _images(subject.graph, images, data), stages)
    if as_json:
        print_json(result.as_json())
    else:
        from hardware.report import verify_rich_table

        print_table(verify_rich_table(result))
    if not result.equal:
        raise typer.Exit(1)


def _verified(subject: Subject, tested: Images, stages: list[str]) -> VerificationResult:
    from hardware.verify import Stage, verify

    with progress_report() as report:
        return verify(
            subject.graph,
            tested.pixels,
            [_stage(subject, name) for name in stages],
            reference=Stage("quantised torch", _reference(subject)) if "engine" in stages else None,
            progress=report,
        )


def _reference(subject: Subject) -> Callable[[npt.NDArray[np.uint8]], dict[str, npt.NDArray]]:
    """Quantised torch: the model itself where there is one, otherwise the graph in torch."""
    model = subject.model
    if model is None:
        from export.torch_module import torch_trace

        return functools.partial(torch_trace, subject.graph)
    from atsnn.quantization import quantize_model
    from export.spikformer import model_trace

    return functools.partial(model_trace, quantize_model(model).eval())


def _stage(subject: Subject, name: str) -> str | Stage:
    from hardware.verify import Stage

    if name == "torch":
        from export.torch_module import torch_trace

        return Stage("graph in torch", functools.partial(torch_trace, subject.graph))
    if name == "onnx":
        return Stage("onnxruntime", _in_onnx(subject.graph, spikes=True))
    if name == "netx":
        from export.formats.netx import netx_trace

        return Stage("lava-dl netx", functools.partial(netx_trace, subject.graph))
    return name


# --- run ---


@command("run")
def run_command(
    model: ModelArgument = None,
    images: ImagesOption = None,
    backend: Annotated[
        str, typer.Option("--backend", metavar="NAME", help=f"One of {', '.join(BACKENDS)}.")
    ] = "engine",
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify images with one of the executors."""
    chosen = choice("--backend", backend, BACKENDS)
    subject = _subject(model)
    tested = _images(subject.graph, images, data)
    start = time.monotonic()
    with progress_report() as report:
        trace = _backend(subject, chosen, report)(tested.pixels)
    outcome = {
        "model": subject.name,
        "backend": chosen,
        **_outcome(trace["logits"], tested, time.monotonic() - start),
        "average_tokens": _average_tokens(subject.graph, trace),
    }
    if as_json:
        print_json(outcome)
    else:
        _print_outcome(outcome)


def _backend(
    subject: Subject, name: str, report: Report
) -> Callable[[npt.NDArray[np.uint8]], dict[str, npt.NDArray]]:
    graph = subject.graph

    def count(done: int, total: int) -> None:
        report(name, done, total)

    if name == "engine":
        from hardware.engine import run

        return lambda pixels: dict(run(graph, pixels, count_events=False, progress=count).trace)
    if name == "torch":
        from export.torch_module import torch_trace

        return lambda pixels: torch_trace(graph, pixels, progress=count)
    if name == "onnx":
        return _in_onnx(graph)
    from export.lava.run import run_lava

    grain: Literal["layers", "blocks"] = "layers" if name == "lava-layers" else "blocks"
    return lambda pixels: dict(run_lava(graph, pixels, grain, on_progress=count))


def _in_onnx(
    graph: Graph, *, spikes: bool = False
) -> Callable[[npt.NDArray[np.uint8]], dict[str, npt.NDArray]]:
    from export.formats.onnx import onnx_trace, to_onnx

    return lambda pixels: onnx_trace(to_onnx(graph, spikes=spikes, events=pixels.ndim == 5), pixels)


def _outcome(logits: npt.NDArray, tested: Images, seconds: float) -> dict[str, Any]:
    classes = logits.argmax(axis=1)
    return {
        "images": len(classes),
        "accuracy": float((classes == tested.labels).mean()),
        "seconds": round(seconds, 3),
        "classes": classes.tolist(),
    }


def _print_outcome(outcome: dict[str, Any]) -> None:
    print(f"images          {outcome['images']}")
    print(f"accuracy        {outcome['accuracy']:.2%}")
    if outcome.get("average_tokens") is not None:
        print(f"average tokens  {outcome['average_tokens']:.1%} (open gates / (L * T * N))")
    print(f"time            {outcome['seconds']:.1f} s")


def _average_tokens(graph: Graph, trace: dict[str, npt.NDArray]) -> float | None:
    gates = [trace[name].mean() for name in graph.block_gates if name in trace]
    return float(np.mean(gates)) if gates else None


# --- energy ---


@command("energy")
def energy_command(
    model: ModelArgument = None,
    images: Annotated[
        int, typer.Option("--images", min=1, metavar="N", help="The first N test images.")
    ] = 64,
    profile: Annotated[
        str,
        typer.Option(
            "--profile", metavar="NAME", help="Chip profile: a shipped one or a YAML file."
        ),
    ] = "loihi1",
    gpu: GpuOption = "auto",
    gpu_profile: Annotated[
        str,
        typer.Option("--gpu-profile", metavar="NAME", help="GPU profile: a shipped one or a file."),
    ] = "a100",
    layers: Annotated[
        bool, typer.Option("--layers", help="Also print the events of every layer.")
    ] = False,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count events and price them: all tokens, adaptive, a quantised ANN and a GPU."""
    subject = _subject(model)
    tested = _images(subject.graph, images, data)
    table = _energy(subject, tested, profile, gpu, gpu_profile)
    if as_json:
        print_json(table.as_json())
        return
    from hardware.report import energy_rich_table, layers_rich_table

    if layers:
        print_table(layers_rich_table(table.all_tokens, table.adaptive))
    print_table(energy_rich_table(table))


def _energy(
    subject: Subject, tested: Images, profile: str, gpu: str, gpu_profile: str
) -> EnergyTable:
    from hardware.energy import energy_table

    chosen = choice("--gpu", gpu, ("auto", "measured", "modelled", "none"))
    with progress_report() as report:
        return energy_table(
            subject.graph,
            tested.pixels,
            profile=profile,
            gpu=chosen,  # type: ignore[arg-type]  # one of the four, checked above
            gpu_profile=gpu_profile,
            progress=functools.partial(report, "events"),
        )


# --- demo ---


@command("demo")
def demo_command(
    model: ModelArgument = None,
    images: Annotated[
        int, typer.Option("--images", min=1, metavar="N", help="Images for accuracy and torch.")
    ] = 512,
    lava_images: Annotated[
        int, typer.Option("--lava-images", min=1, metavar="N", help="Images for Lava.")
    ] = 64,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """The whole way on the built-in model: accuracy, tokens, spikes, operations, energy."""
    from hardware.engine import run
    from hardware.report import energy_rich_table, tokens_rich_table, verify_rich_table

    subject = _subject(model)
    tested = _images(subject.graph, images, data)
    if not as_json:
        print(f"{subject.name}: {_describe(subject.graph)}")
        print(f"{tested.origin}: {len(tested)}")
    with progress_report() as report:
        result = run(
            subject.graph,
            tested.pixels,
            record="none",
            progress=functools.partial(report, "engine"),
        )
    accuracy = float((result.classes == tested.labels).mean())
    if not as_json:
        print(f"accuracy        {accuracy:.2%}")
        print(f"average tokens  {result.average_tokens:.1%} (open gates / (L * T * N))")
        print_table(tokens_rich_table(result))
    stages, skipped = _demo_stages(subject, tested, lava_images)
    if not as_json:
        print_table(verify_rich_table(stages))
        if skipped:
            print(f"Lava skipped: {skipped}")
    energy = _energy(subject, tested, "loihi1", "auto", "a100")
    if as_json:
        print_json(
            {
                "model": subject.name,
                "images": len(tested),
                "accuracy": accuracy,
                "average_tokens": result.average_tokens,
                "tokens_per_block": result.tokens_per_block.tolist(),
                **stages.as_json(),
                "lava_skipped": skipped,
                "sops_all_tokens": energy.all_tokens.mean("sops"),
                "sops_adaptive": energy.adaptive.mean("sops"),
                "energy": energy.as_json(),
            }
        )
    else:
        print_table(_operations_table(energy))
        print_table(energy_rich_table(energy))
    if not stages.equal:
        raise typer.Exit(1)


def _demo_stages(
    subject: Subject, tested: Images, lava_images: int
) -> tuple[VerificationResult, str | None]:
    """torch = engine on all images, engine = Lava on some; or why Lava was skipped."""
    from hardware.verify import VerificationResult

    stages = _verified(subject, tested, ["engine"]).stages
    few = tested.first(lava_images)
    skipped = None
    try:
        stages += _verified(subject, few, list(LAVA_STAGES)).stages
    except LavaUnavailableError as error:
        skipped = str(error)
    return VerificationResult(stages), skipped


def _describe(graph: Graph) -> str:
    from export.graph import LIF
    from export.shapes import shapes

    sizes = shapes(graph)
    neurons = sum(int(np.prod(sizes[node.name, "out"])) for node in graph.of_kind(LIF))
    labels = [label for label in dict.fromkeys(graph.blocks.values()) if label]
    return f"{neurons:,} neurons, T = {graph.steps}, parts {', '.join(labels)}"


def _operations_table(energy: EnergyTable) -> Table:
    table = _table(
        f"Operations per image (mean over {energy.images} images)",
        [""],
        ["all tokens", "adaptive", "saved"],
    )
    for label, key in (("synaptic operations", "sops"), ("spikes", "spikes")):
        dense, adaptive = energy.all_tokens.mean(key), energy.adaptive.mean(key)
        saved = 1 - adaptive / dense if dense else 0.0
        table.add_row(label, f"{dense:,.0f}", f"{adaptive:,.0f}", f"{saved:.1%}")
    return table


register_exits(command)
register_place(command)


# --- what several commands share ---


def _subject(model: Path | None) -> Subject:
    from export.built_in import load_subject

    return load_subject(model)


def _images(graph: Graph, count: int | None, data: str | None) -> Images:
    from export.built_in import load_images

    return load_images(graph, count, data)


def _classes(trace: dict[str, npt.NDArray]) -> npt.NDArray[np.int64]:
    return trace["logits"].argmax(axis=1)


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


if __name__ == "__main__":
    main()
