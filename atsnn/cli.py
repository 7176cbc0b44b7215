"""`atsnn train | eval | presets | data | sweep`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atsnn import cli_sweep
from atsnn.config import RunConfig, apply_changes, parse, preset_names, read_preset, read_yaml
from atsnn.errors import AtsnnError, ConfigError
from atsnn.progress import say
from atsnn.tables import print_table

if TYPE_CHECKING:
    from atsnn.data import ImageSet
    from atsnn.evaluation import Comparison, Evaluation
    from atsnn.spikformer import Spikformer

app = typer.Typer(
    help="Train and evaluate spiking vision transformers with adaptive tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(cli_sweep.app, name="sweep")

DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Folder or zip: IDX, CIFAR, class folders, TinyImageNet, N-MNIST; or 'digits' "
        "(built in).",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main() -> None:
    """Entry point: errors that a user can cause end in one line on stderr and exit status 1."""
    try:
        app()
    except AtsnnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run: configuration, log, checkpoints.")],
    preset: Annotated[
        str | None, typer.Option(help="Built-in configuration (`atsnn presets`).")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML configuration.")] = None,
    data: DataOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, to the same bits.")
    ] = False,
    initial: Annotated[
        Path | None, typer.Option(help="Checkpoint to start from (train.initial).")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs (train.epochs, of every stage).")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one key, as in train.lr=0.001 or stages.quantized.train.epochs=2.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model. Without --preset or --config, --resume takes the run's own configuration."""
    values, origin = _configuration(preset, config, out, resume)
    changes = [*(set or [])]
    if initial is not None:
        changes.append(f"train.initial={json.dumps(str(initial))}")
    values = apply_changes(values, changes)
    if epochs is not None:
        values = _with_epochs(values, epochs)
    run = parse(RunConfig, values, origin)

    from atsnn.data import load_dataset
    from atsnn.training import LOG_FILE
    from atsnn.training import train as run_training

    console = Console(stderr=True)
    dataset = load_dataset(data, run.data, run.model)
    say(
        console,
        f"{dataset.format} ({dataset.location}): {len(dataset.train)} training and "
        f"{len(dataset.test)} test images, {len(dataset.classes)} classes",
    )
    model = run_training(run, dataset, out, resume=resume, console=console)
    if as_json:
        print(json.dumps({"model": str(model), "log": str(model.with_name(LOG_FILE))}))
    else:
        say(console, f"model: {model}")


def _configuration(
    preset: str | None, config: Path | None, out: Path, resume: bool
) -> tuple[dict[str, Any], str]:
    if preset is not None and config is not None:
        raise typer.BadParameter("give --preset or --config, not both")
    if preset is not None:
        return read_preset(preset), f"preset {preset}"
    if config is None and resume:
        config = out / "config.yaml"
        if not config.exists():
            raise ConfigError(f"{out}: no run to resume there ({config.name} is missing)")
    if config is None:
        raise typer.BadParameter("give --preset NAME or --config FILE (or --resume)")
    return read_yaml(config), str(config)


def _with_epochs(values: dict[str, Any], epochs: int) -> dict[str, Any]:
    changed = apply_changes(values, [f"train.epochs={epochs}"])
    stages = changed.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        if isinstance(stage, dict) and isinstance(stage.get("train"), dict):
            stage["train"].pop("epochs", None)
    return changed


@app.command("eval")
def evaluate(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]", help="Checkpoint or run folder; default: the built-in model."
        ),
    ] = None,
    data: DataOption = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many test images.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    resize: Annotated[bool, typer.Option("--resize", help="Scale images of another size.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy, average tokens, tokens per block and step, and confusion of a model.

    A quantised model is compared with the float model of the same weights.
    """
    import torch

    from atsnn.evaluation import compare
    from atsnn.progress import Meter

    if threads is not None:
        torch.set_num_threads(threads)
    network, name = _model(model)
    test, classes = _test_images(network, model is None, data, resize, images)
    passes = 2 if network.quantized else 1
    with Meter("images", passes * len(test), Console(stderr=True)) as meter:
        result = compare(network, test, batch, meter.advance)
    if as_json:
        print(json.dumps(_as_dict(name, network, result, classes)))
    else:
        _print_evaluation(name, network, result, classes)


def _model(path: Path | None) -> tuple[Spikformer, str]:
    if path is None:
        from atsnn.demo import load_demo_model

        return load_demo_model(), "built-in model"
    from atsnn.checkpoint import load_model

    return load_model(path), str(path)


def _test_images(
    model: Spikformer, built_in: bool, data: str | None, resize: bool, count: int | None
) -> tuple[ImageSet, tuple[str, ...]]:
    import torch

    from atsnn.config import DataConfig
    from atsnn.data import StoredImages, load_dataset

    if data is None and built_in:
        from atsnn.demo import load_demo_images

        pixels, labels = load_demo_images()
        test = StoredImages(torch.from_numpy(pixels), torch.from_numpy(labels))
        classes = tuple(str(i) for i in range(model.config.classes))
        return (test.first(count) if count else test), classes
    if data is None:
        raise typer.BadParameter("--data DIR is needed with a model of your own")
    # the built-in digits are 8 x 8, and no model takes so few pixels: they are always scaled
    config = DataConfig(resize=resize or data == "digits", test_images=count)
    dataset = load_dataset(data, config, model.config)
    return dataset.test, dataset.classes


def _as_dict(
    name: str, model: Spikformer, result: Comparison, classes: tuple[str, ...]
) -> dict[str, Any]:
    ours, twin = result.model, result.float_model
    return {
        "images": ours.images,
        "accuracy": ours.accuracy,
        "accuracy_float": twin.accuracy,
        "average_tokens": ours.average_tokens,
        "average_tokens_float": twin.average_tokens,
        "tokens_per_block_and_step": ours.open_gates.tolist(),
        "agreeing": result.agreeing,
        "agreement": result.agreement.tolist(),
        "confusion": ours.confusion.tolist(),
        "confusion_float": twin.confusion.tolist(),
        "accuracy_per_class": [_or_none(share) for share in ours.class_accuracy],
        "classes": list(classes),
        "firing_rates": ours.rates,
        "quantized": model.quantized,
        "model": name,
    }


def _or_none(share: float) -> float | None:
    return share if share == share else None


def _print_evaluation(
    name: str, model: Spikformer, result: Comparison, classes: tuple[str, ...]
) -> None:
    ours, twin = result.model, result.float_model
    kind = "quantised" if model.quantized else "float"
    print(f"{name} ({kind}), {ours.images} images")
    print(f"accuracy        {ours.accuracy:.2%}")
    if model.quantized:
        same = f"same weights; same class on {result.agreeing:.2%} of images"
        print(f"accuracy float  {twin.accuracy:.2%} ({same})")
    print(
        f"average tokens  {ours.average_tokens:.1%} (active cells / (L * T * N), mean over images)"
    )
    print_table(_token_table(ours, model.config.tokens))
    print_table(_class_table(result, classes, model.quantized))
    print_table(_matrix("confusion (true class by row)", ours.confusion.tolist(), classes))
    if model.quantized:
        title = "agreement (float model's class by row, quantised model's by column)"
        print_table(_matrix(title, result.agreement.tolist(), classes))


def _token_table(evaluation: Evaluation, tokens: int) -> Table:
    steps = evaluation.open_gates.shape[1]
    headings = ["block", *(f"step {t + 1}" for t in range(steps)), "mean"]
    rows = [
        [str(index + 1), *(f"{share * tokens:.1f}" for share in block), f"{block.mean():.1%}"]
        for index, block in enumerate(evaluation.open_gates)
    ]
    return _table(f"tokens per block and step (of {tokens})", headings, rows)


def _class_table(result: Comparison, classes: tuple[str, ...], quantized: bool) -> Table:
    headings = ["class", "images", "accuracy", *(["float"] if quantized else [])]
    counts = result.model.confusion.sum(1).tolist()
    pairs = zip(result.model.class_accuracy, result.float_model.class_accuracy, strict=True)
    rows = [
        [
            _name(classes, i),
            str(counts[i]),
            *(f"{x:.1%}" for x in (pair if quantized else pair[:1])),
        ]
        for i, pair in enumerate(pairs)
        if counts[i]
    ]
    return _table("classes", headings, rows)


def _matrix(title: str, counts: list[list[int]], classes: tuple[str, ...]) -> Table:
    """A count matrix; above 20 classes only the most frequent confusions are listed."""
    names = [_name(classes, i) for i in range(len(counts))]
    if len(counts) <= 20:
        rows = [[names[i], *(str(x) if x else "." for x in row)] for i, row in enumerate(counts)]
        return _table(title, ["", *names], rows)
    cells = [(x, i, j) for i, row in enumerate(counts) for j, x in enumerate(row) if x and i != j]
    rows = [[names[i], names[j], str(x)] for x, i, j in sorted(cells, reverse=True)[:20]]
    return _table(f"{title}: the most frequent off the diagonal", ["row", "column", "images"], rows)


def _name(classes: tuple[str, ...], index: int) -> str:
    return classes[index] if index < len(classes) else str(index)


def _table(title: str, headings: Iterable[str], rows: Iterable[list[str]]) -> Table:
    """A plain table; class names come from folders and are no markup."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(Text(heading), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


@app.command()
def presets(as_json: JsonOption = False) -> None:
    """List the built-in configurations."""
    described = {name: _describe_preset(name) for name in preset_names()}
    if as_json:
        print(json.dumps(described))
        return
    for name, text in described.items():
        print(f"{name:28} {text}")


def _describe_preset(name: str) -> str:
    run = parse(RunConfig, read_preset(name), f"preset {name}")
    stages = run.stage_configs()
    model = list(stages.values())[-1].model
    size = "x".join(str(n) for n in model.image_size)
    epochs = " + ".join(str(stage.train.epochs) for stage in stages.values())
    last = list(stages.values())[-1]
    parts = ("halting" * model.halting.enabled, "merging" * model.merging.enabled)
    traits = [part for part in (*parts, "quantised" * last.train.quantized) if part]
    return (
        f"{model.blocks}-{model.dim}, {size}, {model.classes} classes, T = {model.steps}, "
        f"{epochs} epochs, {', '.join(traits) or 'all tokens, float'}"
    )


@app.command("data")
def show_data(
    data: Annotated[str, typer.Argument(metavar="DIR", help="Data folder or zip, or 'digits'.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a data folder holds."""
    from atsnn.data import describe

    found = describe(data)
    if as_json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{key:13} {text}")


if __name__ == "__main__":
    main()
