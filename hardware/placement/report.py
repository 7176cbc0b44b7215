"""Tables of placements, placed energy and break-even, as rich renderables."""

from __future__ import annotations

from rich.table import Table

from hardware.energy import Cost, EnergyRow
from hardware.placement.break_even import LARGEST_BATCH, BreakEven
from hardware.placement.energy import CAUSES
from hardware.placement.place import Placement
from hardware.placement.split import RESOURCES
from hardware.placement.table import MODEL_NOTE, PlacedSystem, PlacedTable
from hardware.profile import Profile, Quantity, load_profile, profile_names
from hardware.report import format_count, format_joules


def _table(title: str, left: list[str], right: list[str], caption: str = "") -> Table:
    table = Table(title=title, title_justify="left", caption=caption or None)
    for index, heading in enumerate(left):
        table.add_column(heading, no_wrap=not index, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def layers_table(placement: Placement) -> Table:
    """Per layer: how it is cut, and what its largest tile uses of what a core has."""
    name, share = placement.tightest()
    bounds = placement.bounds
    table = _table(
        f"{placement.profile.name}: {placement.cores:,} cores on {placement.mesh.chips} chips "
        f"(lower bound {max(bounds.values()):,} cores), {placement.chosen}",
        ["layer", "kind", "cut"],
        ["neurons", "tiles", *_headings(placement)],
        f"Tightest limit: {name}, {share:.1%} of a core. Columns on the right: largest tile. Lower "
        "bounds: " + ", ".join(f"{name} {cores:,}" for name, cores in bounds.items()) + ".",
    )  # fmt: skip
    for layer in placement.network.layers.values():
        split = placement.splits[layer.name]
        largest = placement.packing.needs[layer.name].max(axis=0)
        table.add_row(
            layer.name,
            layer.kind,
            f"{split.strategy}, {split.rows} x {split.columns}",
            f"{layer.grid.neurons:,}",
            f"{split.tiles:,}",
            *(f"{used:,}" for used in largest),
        )
    return table


def _headings(placement: Placement) -> list[str]:
    """Resources, each with what a core has of it."""
    capacities = zip(RESOURCES, placement.limits.capacity, strict=True)
    return [f"{name} of {capacity:,.0f}" for name, capacity in capacities]


def cores_table(placement: Placement) -> Table:
    """Per core: chip, tile, layers, and used of allowed."""
    table = _table(
        f"Cores of {placement.profile.name}",
        ["core", "chip", "tile", "layers"],
        _headings(placement),
    )
    for core in placement.cores_json():
        table.add_row(
            str(core["core"]),
            str(core["chip"]),
            "{}, {}".format(*core["tile"]),
            ", ".join(core["layers"]),
            *(f"{core['used'][name]:,}" for name in RESOURCES),
        )
    return table


def traffic_lines(placement: Placement) -> list[str]:
    """Messages and hops, beside what cores in the order of the network would make."""
    hops, before = placement.hops, placement.hops_in_order
    saved = 1 - hops / before if before else 0.0
    source = (
        f"measured on {placement.activity.images} images"
        if placement.activity.images
        else "assumed"
    )
    messages = placement.traffic.sum() + placement.entering.sum()
    return [
        f"messages per image {format_count(float(messages))} ({source}); "
        f"hops {format_count(hops)}, with cores in order {format_count(before)} ({saved:.0%} saved)"
    ]


def energy_placed_table(table: PlacedTable) -> Table:
    """One line for each form of the network: energy by cause, total and dynamic, time, darkness."""
    first = table.systems[0].placement
    out = _table(
        f"Energy per image on {first.profile.name} ({MODEL_NOTE}; mean over {table.images} images)",
        ["system"],
        ["tokens", *CAUSES, "total", "dynamic", "cores", "dark", "latency", "images/s"],
        _placed_caption(table),
    )
    for system in table.systems:
        events, cost = system.events, system.cost
        out.add_row(
            system.name,
            f"{events.average_tokens:.1%}",
            *(_range(cost.causes[cause]) for cause in CAUSES),
            _range(cost.total),
            _range(cost.dynamic),
            str(system.placement.cores),
            f"{events.dark_share:.1%}",
            _seconds(events.times.latency),
            _span(events.times.images_per_second, ""),
        )
    return out


def system_layers_table(system: PlacedSystem) -> Table:
    """Energy of one form by layer and cause, and the share of its tiles' steps dark."""
    out = _table(
        f"{system.name} on {system.placement.profile.name}, energy per image ({MODEL_NOTE})",
        ["layer", "kind"],
        ["synapse", "neuron", "message", "idle", "SOPs", "messages in", "dark"],
    )
    events = system.events
    steps = events.images * events.steps
    for layer in events.layers:
        costs = system.cost.layers[layer.name]
        dark = layer.sum("dark") / (steps * layer.tiles)
        out.add_row(
            layer.name,
            f"{layer.kind}, {layer.order}" if layer.order else layer.kind,
            *(_range(costs[cause]) for cause in ("synapse", "neuron", "message", "idle")),
            format_count(layer.sum("sops") / events.images),
            format_count(layer.sum("received") / events.images),
            f"{dark:.1%}",
        )
    return out


def _placed_caption(table: PlacedTable) -> str:
    system = table.systems[-1]
    unpriced = system.cost.unpriced
    lines = [
        f"Convention: {system.cost.convention}; grade: {system.cost.total.grade}. Dynamic: without "
        f"static power. Cores on {system.placement.mesh.chips} chips. Dark: core-steps in "
        "which nothing is updated and nothing arrives."
    ]
    if unpriced:
        lines.append(f"No price in this profile for: {', '.join(unpriced)}.")
    return " ".join(lines)


def rivals_table(rows: tuple[EnergyRow, ...]) -> Table:
    """Conventions, the ANN, GPU and CPU."""
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    out = _table(
        "Rivals and conventions",
        ["system", "convention", "grade", "how"],
        ["energy per image"],
        " ".join(f"{note[0].upper()}{note[1:]}." for note in notes),
    )
    for row, following in zip(rows, (*rows[1:], None), strict=True):
        how = "joule meter" if row.grade == "measured" else "model"
        out.add_row(
            row.system,
            row.convention,
            row.grade,
            how,
            _range(Cost(row.joules_low, row.joules_high, row.grade)),
            end_section=following is None or following.system != row.system,
        )
    return out


def break_even_table(lines: tuple[BreakEven, ...]) -> Table:
    """Up to which firing rate and token share the chip wins, surely and at best."""
    first = lines[0]
    out = _table(
        f"Break-even of {first.chip}: measured firing {first.firing:.2%} a neuron and step, tokens "
        f"{first.tokens:.1%}",
        ["rival (modelled)"],
        ["batch", "chip", "rival", "firing, surely", "firing, at best", "tokens, surely",
         "tokens, at best", "up to batch, surely"],
        "Surely: the chip's high end below the rival's low end. At best: its low end below the "
        "rival's high end. 'always': up to one spike a neuron and step, or all tokens.",
    )  # fmt: skip
    for line in lines:
        out.add_row(
            line.rival,
            str(line.batch),
            _range(Cost(*line.chip_joules, "assumed")),
            _range(Cost(*line.rival_joules, "assumed")),
            *(_below(x) for x in (line.firing_sure, line.firing_may)),
            *(_below(x) for x in (line.tokens_sure, line.tokens_may)),
            _batch(line.batch_sure),
        )
    return out


def _batch(batch: int) -> str:
    if batch <= 0:
        return "none"
    return f"{batch} or more" if batch >= LARGEST_BATCH else str(batch)


def _below(share: float) -> str:
    if share <= 0:
        return "never"
    return "always" if share >= 1 else f"below {share:.1%}"


def _range(cost: Cost) -> str:
    low, high = format_joules(cost.low), format_joules(cost.high)
    return low if low == high else f"{low} ... {high}"


def _seconds(pair: tuple[float, float]) -> str:
    low, high = (f"{1e3 * value:.3g} ms" for value in pair)
    return low if low == high else f"{low} ... {high}"


def _span(pair: tuple[float, float], unit: str) -> str:
    low, high = (f"{value:.3g}{unit}" for value in pair)
    return low if low == high else f"{low} ... {high}"


# --- profiles ---


def profiles_table() -> Table:
    """All shipped profiles."""
    out = _table("Profiles", ["name", "kind", "convention", "grades", "note"], ["numbers"])
    for name in profile_names():
        profile = load_profile(name)
        numbers = [quantity for _, _, quantity in profile.quantities()]
        grades = sorted({quantity.grade for quantity in numbers})
        out.add_row(
            name, profile.kind, profile.convention, ", ".join(grades), profile.note,
            str(len(numbers)),
        )  # fmt: skip
    return out


def profile_table(profile: Profile) -> Table:
    """Every number of a profile with its source and grade."""
    out = _table(
        f"{profile.name}: {profile.convention}",
        ["section", "number", "value", "grade", "source"],
        [],
        profile.note,
    )
    for section, field, quantity in profile.quantities():
        out.add_row(section, field, value_text(quantity), quantity.grade, quantity.source)
    return out


def value_text(quantity: Quantity) -> str:
    """A number or a range with its unit."""
    unit = "" if quantity.unit == "1" else f" {quantity.unit}"
    if quantity.value is not None:
        return f"{quantity.value:g}{unit}"
    return f"{quantity.low:g} ... {quantity.high:g}{unit}"
