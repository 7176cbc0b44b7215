"""The results page: every sentence with a number in it takes the number from a table."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from atsnn.errors import ConfigError
from hardware.profile import load_profile, weakest
from hardware.report import format_count, format_joules
from hardware.sweep import pictures
from hardware.sweep.cell import DETAILS_FILE, Job, load_job
from hardware.sweep.config import Cell, MethodConfig, Source, SweepConfig, cell_id, cells_of
from hardware.sweep.files import write_file
from hardware.sweep.measure import PROFILES
from hardware.sweep.runner import TABLE_FILE, TEST_TABLE_FILE, read_table, row_id
from hardware.sweep.start import Stage, start_stages
from hardware.sweep.summary import (
    OperationClaim,
    Point,
    TokenClaim,
    operation_claim,
    paired,
    points,
    reference,
    standard_error,
    token_claims,
)

_TEMPLATE = "results.md.j2"
_TITLE = "# Results: adaptive tokens against their rivals"
_CLAIMED = 0.424
_PRICED = (
    "synaptic_operation",
    "convolution_operation",
    "accumulate",
    "multiply_accumulate",
    "neuron_update_active",
    "neuron_update_idle",
    "spike",
)


def write_page(folders: Sequence[Path], page: Path) -> list[Path]:
    """Write the page and, in a folder beside it, its pictures and tables; returns all files.

    Args:
        folders: of sweeps, in the order of the page. page: a `.md` file.

    Raises:
        ConfigError: a folder without a table or its pictures' numbers, two folders of one name, or
            a file that cannot be written.
    """
    if page.is_file() and not page.read_text(encoding="utf-8", errors="replace").startswith(_TITLE):
        raise ConfigError(f"{page}: was not written by this command; choose another --page")
    names = [folder.resolve().name for folder in folders]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two folders are named {twice[0]}, as their pictures would be; rename one of them"
        )
    sweeps, written = [], []
    for folder in folders:
        context, files = _sweep(load_job(folder), page)
        sweeps.append(context)
        written += files
    text = _template().render(
        title=_TITLE,
        sweeps=sweeps,
        profiles=PROFILES,
        grades=[_grade(name) for name in PROFILES],
        page_of=_linked(page),
        command=f"atsnn sweep report {' '.join(map(str, folders))} --page {page}",
    )
    write_file(page, _squeezed(text).encode())
    return [page, *written]


def _grade(profile: str) -> str:
    """The weakest grade of a profile's prices, those of traffic left out."""
    prices = load_profile(profile).energy
    found = [getattr(prices, name) for name in _PRICED]
    return weakest(price.grade for price in found if price is not None)


def _linked(page: Path) -> Callable[[str, str], str]:
    """Words that lead to another page, where that page lies beside this one."""
    return lambda words, name: f"[{words}]({name})" if (page.parent / name).exists() else words


def _methods(sweep: SweepConfig, shown: set[str]) -> list[dict[str, str]]:
    """What each method changes in the run that all share."""
    return [
        {"label": method.label or method.name, "changes": _changes(method)}
        for method in sweep.methods
        if method.name in shown and method.group != "ablation"
    ]


def _changes(method: MethodConfig) -> str:
    source = [f"weights of {method.source.method}"] if method.source else []
    sections = [f"{name}: {_flow(values)}" for name, values in method.given().items()]
    budgets = {budget: changes.given() for budget, changes in method.budgets.items()}
    by_budget = [f"{budget}: {_flow(values)}" for budget, values in budgets.items() if values]
    return "; ".join(f"`{part}`" for part in source + sections + by_budget) or "nothing"


def _flow(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=10_000).strip()


def _template() -> jinja2.Template:
    source = (resources.files("hardware.sweep") / _TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source)


def _squeezed(text: str) -> str:
    """One empty line at a time, and none between the rows of a table."""
    lines: list[str] = []
    for line in text.splitlines():
        line = line.rstrip()
        if not line and (not lines or not lines[-1]):
            continue
        if line.startswith("|") and len(lines) > 1 and not lines[-1] and lines[-2].startswith("|"):
            lines.pop()
        lines.append(line)
    return "\n".join(lines).rstrip() + "\n"


def _sweep(job: Job, page: Path) -> tuple[dict[str, Any], list[Path]]:
    cells = {cell.id: _last_steps(cell) for cell in cells_of(job.sweep)}
    table = [
        # a cell that ended before there were exits does not say its steps
        {**row, "mean_steps": row.get("mean_steps") or str(cells[row_id(row)])}
        for row in read_table(job.folder / TABLE_FILE)
        if row_id(row) in cells
    ]
    if not table:
        raise ConfigError(f"{job.folder}: holds no table with rows yet; run the sweep first")
    labels = {method.name: method.label for method in job.sweep.methods}
    sources = {method.name: method.source for method in job.sweep.methods}
    found = points(table, labels)
    tests = {(p.method, p.budget): p for p in points(_tests(job), labels)}
    everything = reference(found)
    groups = {method.group for method in job.sweep.methods}
    rows = [_row(point, everything, tests) for point in found]
    done = [row for row in table if row["status"] == "done"]
    context: dict[str, Any] = {
        "title": job.sweep.title,
        "note": job.sweep.note,
        "cells": len(cells),
        "done": len(done),
        "left": len(cells) - len(table),
        "methods": _methods(job.sweep, {row["method"] for row in done}),
        "images": done[0]["images"] if done else 0,
        "compared": f"{sum(int(row['spikes_compared']) for row in done):,}",
        "differing": sum(int(row["spikes_differing"]) for row in done),
        "rows": [row for row, point in zip(rows, found, strict=True) if not _is_ablation(point)],
        "token_claims": [_token_claim(claim) for claim in token_claims(found)],
        "verdict": _verdict(token_claims(found)),
        "candidates": max((claim.candidates for claim in token_claims(found)), default=0),
        "error": f"{standard_error(found[0]) * 100:.2f}" if found else "",
        "operation_claims": [
            _operation_claim(operation_claim(found, group), name)
            for group, name in (("ours", "Ours"), ("rival", "Rivals"))
            if group in groups
        ],
        "has_rivals": groups >= {"ours", "rival"},
        "limit": _limit(everything),
        "ablations": _ablations(found, everything, sources),
        "failed": [
            {
                "cell": row_id(row),
                "error": row["error"].replace("|", "\\|"),
            }
            for row in table
            if row["status"] == "failed"
        ],
        "start": _start(start_stages(job.start)),
        "curve": "",
        "costs": "",
        "pictured": "",
    }
    drawn = _draw(job, found, context, page) if done else []
    copied = _copy_tables(job, page)
    context["tables"] = [path.relative_to(page.parent).as_posix() for path in copied]
    return context, drawn + copied


def _copy_tables(job: Job, page: Path) -> list[Path]:
    """Put the tables beside the pictures, so that every number of the page can be read again."""
    copied = []
    for name in (TABLE_FILE, TEST_TABLE_FILE):
        if (job.folder / name).exists():
            path = page.parent / page.stem / f"{job.folder.resolve().name}-{name}"
            write_file(path, (job.folder / name).read_bytes())
            copied.append(path)
    return copied


def _last_steps(cell: Cell) -> int:
    """Time steps of a cell's model."""
    *_, last = cell.run.stage_configs().values()
    return last.model.steps


def _start(stages: list[Stage]) -> str:
    """How the start was trained, in a sentence; empty if its folder does not say."""
    if not stages:
        return ""
    parts = [
        f"{len(stage.train)} epoch{'s' * (len(stage.train) > 1)} with T = {stage.steps}"
        for stage in stages
    ]
    return (
        f"Every cell starts from one model of all tokens, trained for {', then '.join(parts)} "
        f"(seed {stages[0].seed}): {stages[-1].watched[-1]:.2%} of the {stages[-1].others}."
    )


def _tests(job: Job) -> list[dict[str, str]]:
    return read_table(job.folder / TEST_TABLE_FILE)


def _is_ablation(point: Point) -> bool:
    return point.group == "ablation"


# --- numbers in words ---


def _row(
    point: Point, everything: Point | None, tests: dict[tuple[str, str], Point]
) -> dict[str, Any]:
    test = tests.get((point.method, point.budget))
    return {
        "label": point.label,
        "budget": point.budget,
        "seeds": point.seeds,
        "epochs": round(point.mean("epochs")),
        "accuracy": _range(point, "accuracy"),
        "test": _tested(point, test) if test else "",
        "tokens": _range(point, "average_tokens", 1),
        "steps": f"{point.mean('mean_steps'):.3g}",
        "sops": format_count(point.mean("sops")),
        "change": _change(point, everything),
        "stem": f"{point.mean('stem_sops') / point.mean('sops'):.0%}",
        "macs": format_count(point.mean("macs")),
        "decision": format_count(point.mean("selector_macs")),
        "joules": [format_joules(point.mean(f"joules/{name}")) for name in PROFILES],
    }


def _tested(point: Point, test: Point) -> str:
    some = f", {test.seeds} of {point.seeds} seeds" if test.seeds < point.seeds else ""
    return f"{_range(test, 'accuracy')}{some}"


def _range(point: Point, column: str, digits: int = 2) -> str:
    """The mean in per cent, with the range over seeds where there is one."""
    low, high = point.spread(column)
    mean = f"{point.mean(column) * 100:.{digits}f} %"
    if point.seeds == 1:
        return mean
    return f"{mean} ({low * 100:.{digits}f}–{high * 100:.{digits}f})"


def _change(point: Point, everything: Point | None) -> str:
    pair = None if everything is None or everything is point else paired(point, everything)
    if pair is None:
        return ""
    return f"{(pair[0].mean('sops') / pair[1].mean('sops') - 1) * 100:+.1f} %"


def _token_claim(claim: TokenClaim) -> dict[str, Any]:
    ours = claim.ours
    return {
        "rival": claim.rival.name,
        "seeds": claim.rival.seeds,
        "rival_accuracy": _range(claim.rival, "accuracy"),
        "rival_tokens": _range(claim.rival, "average_tokens", 1),
        "ours": ours.name if ours else "none is as accurate",
        "accuracy": _range(ours, "accuracy") if ours else "",
        "tokens": _range(ours, "average_tokens", 1) if ours else "",
        "fewer": f"{claim.fewer * 100:.1f} %" if claim.fewer is not None else "",
    }


def _verdict(claims: list[TokenClaim]) -> str:
    if not claims:
        return ""
    first = claims[0]
    if first.ours is None or first.fewer is None:
        return "no point of ours is as accurate, so the claim does not hold here"
    if first.fewer < 0:
        more = f"{-first.fewer * 100:.1f} % more tokens"
        return f"{first.ours.name} has {more}, so the claim does not hold here"
    words = f"{first.ours.name} has {first.fewer * 100:.1f} % fewer tokens"
    if first.fewer >= _CLAIMED:
        return f"{words}, at least the 42.4 % that the paper claims"
    return f"{words}, less than the 42.4 % that the paper claims"


def _operation_claim(claim: OperationClaim | None, name: str) -> str:
    if claim is None:
        return f"{name}: no point loses at most 0.5 points against all tokens, or there is none."
    lost = claim.lost * 100
    words = f"{lost:.2f} points lost" if lost >= 0 else f"{-lost:.2f} points gained"
    change = "fewer" if claim.fewer >= 0 else "more"
    return (
        f"{name}: {claim.point.name} has {abs(claim.fewer) * 100:.1f} % {change} SOPs than all "
        f"tokens, stem included, at {words} (seeds: {claim.point.seeds})."
    )


def _limit(everything: Point | None) -> str:
    if everything is None:
        return ""
    stem = everything.mean("stem_sops") / everything.mean("sops")
    return (
        f"The stem has {stem:.0%} of the SOPs of all tokens, and gates save none of it: with the "
        f"whole stem at every step, at most {1 - stem:.0%} can be saved. An exit over time steps "
        "leaves out whole steps, the stem's as well."
    )


def _ablations(
    found: list[Point], everything: Point | None, sources: dict[str, Source | None]
) -> list[dict[str, Any]]:
    families: dict[str, list[Point]] = {}
    for point in found:
        if point.family:
            families.setdefault(point.family, []).append(point)
    return [
        _ablation(family, members, _base(found, members, everything, sources))
        for family, members in families.items()
    ]


def _base(
    found: list[Point],
    members: list[Point],
    everything: Point | None,
    sources: dict[str, Source | None],
) -> Point | None:
    """What a family differs from: the cell whose weights all of it take, else all tokens."""
    taken = {(s.method, s.budget) if (s := sources[point.method]) else None for point in members}
    if len(taken) > 1 or None in taken:
        return everything
    return next((point for point in found if (point.method, point.budget) in taken), None)


def _ablation(family: str, members: list[Point], base: Point | None) -> dict[str, Any]:
    return {
        "family": family,
        "rows": [
            _variant(point, base)
            for point in ([] if base is None or base in members else [base]) + members
        ],
    }


def _variant(point: Point, base: Point | None) -> dict[str, Any]:
    pair = None if base is None or point is base else paired(point, base)
    row = {
        "label": f"{point.name} (as trained)" if point is base else point.name,
        "seeds": point.seeds,
        "epochs": round(point.mean("epochs")) or "not retrained",
        "accuracy": _range(point, "accuracy"),
        "tokens": _range(point, "average_tokens", 1),
        "sops": format_count(point.mean("sops")),
    }
    if pair is None:
        return {**row, "points": "", "change": ""}
    gained = pair[0].mean("accuracy") - pair[1].mean("accuracy")
    return {**row, "points": f"{gained * 100:+.2f}", "change": _change(point, base)}


# --- pictures ---


def _draw(job: Job, found: list[Point], context: dict[str, Any], page: Path) -> list[Path]:
    folder = page.parent / page.stem
    prefix = job.folder.resolve().name

    def place(name: str) -> Path:
        path = folder / f"{prefix}-{name}.png"
        context[name] = f"{page.stem}/{path.name}"
        written.append(path)
        return path

    written: list[Path] = []
    pictures.draw_costs(found, place("costs"))
    if stages := start_stages(job.start):
        pictures.draw_curve(stages, place("curve"))
    chosen = _pictured(job, found)
    if chosen is None:
        return written
    cell = next(c for c in cells_of(job.sweep) if c.id == chosen)
    grid = cell.run.model.grid
    details = _details(job.place(cell) / DETAILS_FILE)
    context["pictured"] = f"`{chosen}`"
    context["has_images"] = "images" in details
    pictures.draw_open_tokens(details, grid, place("open"))
    pictures.draw_token_maps(details, grid, place("maps"))
    pictures.draw_class_steps(details, place("classes"))
    return written


def _details(path: Path) -> dict[str, Any]:
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); remove the cell's folder and run the sweep again"
        ) from None


def _pictured(job: Job, found: list[Point]) -> str | None:
    """Id of the cell that is drawn: the configured one, else the last of ours that ended."""
    wanted = job.sweep.picture
    if wanted is None:
        ours = [point for point in found if point.group == "ours"]
        if not ours:
            return None
        wanted = Source(method=ours[-1].method, budget=ours[-1].budget)
    for point in found:
        if (point.method, point.budget) == (wanted.method, wanted.budget):
            return cell_id(point.method, point.budget, int(point.rows[0]["seed"]))
    return None
