"""Configuration of a sweep, and the cells of its grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from atsnn.config import ConfigSection, RunConfig, merged, parse, read_yaml
from atsnn.errors import ConfigError, ExitError
from atsnn.exits import check_causal

Group = Literal["reference", "ours", "rival", "ablation"]
_NAME = r"^[a-z0-9][a-z0-9_.-]*$"
ONLY = "all"
"""Name of the budget of a method that has none."""


def _no_seed_twice(seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if seeds is not None and len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {list(seeds)}: one stands there twice; it would be the same cell")
    return seeds


Seeds = Annotated[tuple[int, ...], AfterValidator(_no_seed_twice)]
Name = Annotated[str, Field(pattern=_NAME)]
"""Of a method or budget: a part of a folder's name."""


class DeployConfig(ConfigSection):
    """How the trained model is run.

    Attributes:
        exit_margin: an image leaves after the time step at which its two largest logits differ by
            so much (`hardware.exits`); None: every image runs all steps.
        exit_decay: factor on that margin from each step to the next.
    """

    exit_margin: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    exit_decay: float = Field(default=1.0, gt=0, le=1)


class Changes(ConfigSection):
    """What a method or a budget changes, section by section.

    Attributes:
        model, data, augment, train: in the run of the sweep. deploy: afterwards.
    """

    model: dict[str, Any] = Field(default={})
    data: dict[str, Any] = Field(default={})
    augment: dict[str, Any] = Field(default={})
    train: dict[str, Any] = Field(default={})
    deploy: DeployConfig = DeployConfig()

    def given(self) -> dict[str, dict[str, Any]]:
        """The sections that change something, with what was written in each."""
        sections = self.model_dump(include=set(Changes.model_fields), exclude_unset=True)
        return {name: values for name, values in sections.items() if values}


class Source(ConfigSection):
    """The trained cell whose weights a method without training takes (of the same seed)."""

    method: str
    budget: str = ONLY


class MethodConfig(Changes):
    """One method, at one or more budgets.

    Attributes:
        name: in the table. group: what the results page shows it as. label: how pictures call it.
        budgets: name -> what it changes on top of the method; none: one cell named `all`.
        seeds: instead of the sweep's.
        source: the method is not trained: it runs on the weights of this cell, and `model` is laid
            over that cell's; that cell's `deploy` is not taken over.
        family: for ablations, the question that this method is one answer to.
    """

    name: Name
    group: Group = "rival"
    label: str = ""
    family: str = ""
    budgets: dict[Name, Changes] = Field(default={})
    seeds: Seeds | None = None
    source: Source | None = None


class StartConfig(ConfigSection):
    """The run whose checkpoint every cell starts from, where none is given.

    Attributes:
        preset: a built-in run; None: `run` says everything. run: laid over the preset.
    """

    preset: str | None = None
    run: dict[str, Any] = Field(default={})


class SweepConfig(ConfigSection):
    """A grid of cells around one run.

    Attributes:
        title: of the results page. note: a sentence below it, for example about the data.
        start: how the checkpoint is trained that every cell starts from.
        run: what all cells share: model, data, augment, train, stages (the last one quantised).
        seeds: of every method that names none.
        verify_images: so many images of each cell are compared spike by spike, torch with engine.
        measure_images: deployed numbers come from so many validation images (None: all).
        show_images: the licence of the images lets pictures show them.
        picture: the cell (of the first seed) whose tokens the results page draws.
        methods: in the order of the table.
    """

    title: str
    note: str = ""
    picture: Source | None = None
    start: StartConfig | None = None
    run: dict[str, Any]
    seeds: Seeds = (0,)
    verify_images: int = Field(default=256, ge=1)
    measure_images: int | None = Field(default=None, ge=1)
    show_images: bool = False
    methods: tuple[MethodConfig, ...]

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        names = [method.name for method in self.methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"methods: two are named {twice[0]}")
        cells = cells_of(self)
        blind = [cell.id for cell in cells if not cell.run.data.validation_images]
        if blind:
            raise ValueError(
                f"{blind[0]}: no images are held out, and every choice is made on them; set "
                "run.data.validation_images"
            )
        found = {(cell.method, cell.budget) for cell in cells}
        wanted = self.picture
        if wanted is not None and (wanted.method, wanted.budget) not in found:
            raise ValueError(f"picture: no cell {wanted.method} with budget {wanted.budget}")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        id: `<method>@<budget>-s<seed>`, the name of its folder.
        run: its configuration, all stages, without `train.initial`.
        source: id of the cell whose model it takes instead of training; None: it is trained.
        deploy: how its model is run.
    """

    id: str
    method: str
    budget: str
    seed: int
    run: RunConfig
    source: str | None
    deploy: DeployConfig


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep's YAML file.

    Raises:
        ConfigError: unreadable, or the first key that is wrong.
    """
    return parse_sweep(read_yaml(path), str(path))


def parse_sweep(values: dict[str, Any], origin: str) -> SweepConfig:
    """Validate a sweep; see `load_sweep`."""
    return parse(SweepConfig, values, origin)


def cells_of(sweep: SweepConfig) -> list[Cell]:
    """All cells, in the order of the methods, budgets and seeds.

    Raises:
        ConfigError: a cell whose configuration is not valid, or a source that is not in the grid.
    """
    cells = [
        _cell(sweep, method, budget, seed)
        for method in sweep.methods
        for budget in (method.budgets or (ONLY,))
        for seed in (method.seeds if method.seeds is not None else sweep.seeds)
    ]
    by_id = {cell.id: cell for cell in cells}
    for cell in cells:
        if cell.source is None:
            continue
        source = by_id.get(cell.source)
        if source is None or source.source is not None:
            trained = [other.id for other in cells if other.source is None]
            raise ConfigError(
                f"{cell.id}: its source {cell.source} is no trained cell of this sweep; "
                f"there are: {', '.join(trained)}"
            )
    return cells


def _cell(sweep: SweepConfig, method: MethodConfig, budget: str, seed: int) -> Cell:
    name = cell_id(method.name, budget, seed)
    source = method.source
    values = sweep.run
    if source is not None:
        values = _changed(values, *_changes(sweep, source.method, source.budget, name))
    own = _own_changes(method, budget, name)
    values = _changed(values, *own)
    values = merged(values, {"train": {"seed": seed}})
    run = parse(RunConfig, values, f"cell {name}")
    last = list(run.stage_configs().values())[-1]
    if not last.train.quantized:
        raise ConfigError(
            f"cell {name}: its last stage trains a float model, but what is deployed is quantised; "
            "end with a stage that has train.quantized: true"
        )
    if run.train.initial is not None:
        raise ConfigError(
            f"cell {name}: run.train.initial is {run.train.initial}; every cell starts from the "
            "checkpoint that the sweep is given (--start)"
        )
    taken = None if source is None else cell_id(source.method, source.budget, seed)
    deploy = _deploy(own, last, name)
    return Cell(name, method.name, budget, seed, run, taken, deploy)


def _deploy(changes: list[Changes], last: RunConfig, cell: str) -> DeployConfig:
    values: dict[str, Any] = {}
    for change in changes:
        values = {**values, **change.given().get("deploy", {})}
    deploy = parse(DeployConfig, values, f"cell {cell}: deploy")
    if deploy.exit_margin is not None:
        try:
            check_causal(last.model)
        except ExitError as error:
            raise ConfigError(f"cell {cell}: deploy.exit_margin: {error}") from None
    return deploy


def cell_id(method: str, budget: str, seed: int) -> str:
    """Name of a cell and of its folder."""
    return f"{method}@{budget}-s{seed}"


def _changes(sweep: SweepConfig, name: str, budget: str, cell: str) -> list[Changes]:
    for method in sweep.methods:
        if method.name == name:
            return _own_changes(method, budget, cell)
    known = ", ".join(method.name for method in sweep.methods)
    raise ConfigError(f"cell {cell}: no method {name} to take weights from; there are: {known}")


def _own_changes(method: MethodConfig, budget: str, cell: str) -> list[Changes]:
    if budget == ONLY and not method.budgets:
        return [method]
    if budget not in method.budgets:
        raise ConfigError(
            f"cell {cell}: method {method.name} has no budget {budget}; "
            f"there are: {', '.join(method.budgets) or ONLY}"
        )
    return [method, method.budgets[budget]]


def _changed(values: dict[str, Any], *changes: Changes) -> dict[str, Any]:
    """Lay changes over the run; what its stages say of themselves still wins."""
    result = dict(values)
    for change in changes:
        sections = change.given()
        sections.pop("deploy", None)  # says nothing of training
        result = merged(result, sections)
    return result
