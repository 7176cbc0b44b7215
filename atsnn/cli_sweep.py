"""`atsnn sweep run | test | show | report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atsnn.progress import Meter, say
from atsnn.tables import print_table

app = typer.Typer(
    help="Grids of methods, budgets and seeds: train, deploy, compare.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the sweep.")]
_SHOWN = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("average_tokens", "tokens", "{:.1%}"),
    ("mean_steps", "steps", "{:.3g}"),
    ("sops", "SOPs/image", "{:,.0f}"),
    ("macs", "MACs/image", "{:,.0f}"),
    ("spikes_differing", "spikes differing", "{:.0f}"),
    ("seconds", "seconds", "{:.0f}"),
)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the sweep.")],
    out: Annotated[Path, typer.Option(help="Folder of the sweep; run again to go on.")],
    data: Annotated[str, typer.Option("--data", metavar="DIR", help="As for `atsnn train`.")],
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Checkpoint that every cell starts from (default: what OUT was begun with, or "
            "trained in OUT/start, as the sweep's file says).",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Cells at a time on this machine.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Torch threads of each cell (default: torch's).")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Dask scheduler; its workers share the folder."),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the cells that are not done yet, and write OUT/table.csv."""
    from hardware.sweep.cell import Job
    from hardware.sweep.config import cells_of, load_sweep
    from hardware.sweep.runner import read_table, run_sweep
    from hardware.sweep.start import given_before, train_start

    console = Console(stderr=True)
    sweep = load_sweep(config)
    cells = cells_of(sweep)
    start = start or given_before(out) or train_start(sweep, data, out, console)
    here = str(Path(data).resolve()) if Path(data).exists() else data
    job = Job(out.resolve(), sweep, here, start.resolve(), threads)  # workers may stand elsewhere
    done = sum((job.place(cell) / "result.json").exists() for cell in cells)
    say(console, f"{len(cells)} cells, {done} of them ended before")
    with Meter("cells", len(cells), console, done) as meter:

        def report(name: str, row: dict[str, Any]) -> None:
            meter.advance(note=name)
            say(console, f"{name}: {_in_words(row)}")

        table = run_sweep(job, workers, cluster, retry, report)
    rows = read_table(table)
    if as_json:
        print(json.dumps({"table": str(table), "rows": rows}))
    else:
        _print_rows(rows)
        say(console, f"table: {table}")
    if any(row["status"] == "failed" for row in rows):
        raise typer.Exit(1)


@app.command("test")
def on_test_images(
    out: OutArgument,
    cell: Annotated[
        list[str], typer.Option("--cell", help="Id of a finished cell; may be given many times.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Deploy chosen cells on the test images, each once, and write OUT/test.csv."""
    from hardware.sweep.cell import load_job
    from hardware.sweep.runner import deploy_on_test, read_table

    console = Console(stderr=True)
    failed: list[str] = []
    with Meter("cells", len(cell), console) as meter:

        def report(name: str, row: dict[str, Any]) -> None:
            meter.advance(note=name)
            if row.get("status") == "failed":
                failed.append(name)
                say(console, f"{name}: {_in_words(row)}")

        table = deploy_on_test(load_job(out), cell, report)
    rows = read_table(table)
    if as_json:
        print(json.dumps({"table": str(table), "rows": rows, "failed": failed}))
    else:
        _print_rows(rows)
    if failed:
        raise typer.Exit(1)


@app.command()
def show(out: OutArgument, as_json: JsonOption = False) -> None:
    """Print the table of a sweep."""
    from hardware.sweep.cell import load_job
    from hardware.sweep.runner import TABLE_FILE, read_table

    rows = read_table(load_job(out).folder / TABLE_FILE)
    if as_json:
        print(json.dumps(rows))
    else:
        _print_rows(rows)


@app.command()
def report(
    out: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Folders of finished sweeps.")
    ],
    page: Annotated[Path, typer.Option(help="Markdown page to write.")] = Path("docs/results.md"),
    as_json: JsonOption = False,
) -> None:
    """Draw the results page and its pictures from the tables."""
    from hardware.sweep.page import write_page

    written = write_page(out, page)
    if as_json:
        print(json.dumps([str(path) for path in written]))
    else:
        for path in written:
            print(path)


def _in_words(row: dict[str, Any]) -> str:
    if row.get("status") == "failed":
        return f"failed: {row['error']}"
    return f"accuracy {row['accuracy']:.2%}, tokens {row['average_tokens']:.1%}"


def _print_rows(rows: list[dict[str, str]]) -> None:
    """Cells that went well, by the names that `--cell` takes; below them those that failed."""
    from hardware.sweep.runner import row_id

    table = Table(box=None, pad_edge=False)
    table.add_column("cell", no_wrap=True)
    for _, heading, _ in _SHOWN:
        table.add_column(heading, justify="right")
    failed = []
    for row in rows:
        name = row_id(row)
        if row["status"] == "failed":
            failed.append(f"{name}: failed: {row['error']}")
            continue
        cells = [form.format(float(row[key])) if row.get(key) else "" for key, _, form in _SHOWN]
        table.add_row(Text(name), *(Text(cell) for cell in cells))
    print_table(table)
    for line in failed:
        print(line)
