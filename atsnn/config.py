"""Typed configuration of a model and of its training run: YAML in, resolved YAML out.

Every class refuses keys that it does not know. A mistake in a file ends in one `ConfigError` that
names the key, the value and what is allowed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from atsnn.errors import ConfigError

HaltingOrder = Literal["upstream", "rectangle", "raster", "blocks", "steps"]
DataFormat = Literal[
    "auto", "idx", "cifar10", "cifar100", "folder", "tinyimagenet", "digits", "nmnist"
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


ConfigSection = _Section
"""Base of sections that other packages add."""


class HaltingConfig(_Section):
    """Token halting, ACT in two dimensions: a gate is open while its scores sum to < 1 - epsilon.

    Attributes:
        order: what a gate looks at; `upstream` and `blocks` can run on a pipelined chip.
        gamma, beta: of the score `sigmoid(gamma * x_0 + beta)`; with the defaults a stem value of 2
            (both spikes) closes a token's gate at once.
        stem_beta: beta of the stem's score alone (None: `beta`). With -0.7 a token whose channel 0
            stays silent is processed two steps long, and others shorter.
        quiet: share of tokens that the stem's score closes at the first step, those with the fewest
            spikes: channel 0 of the stem is then a fixed detector of quiet tokens (None: channel 0
            is what training makes of it).
        block_scores: the blocks' outputs score too; without it the stem alone decides.
        learn: train gamma and beta with the weights.
        stem_score: the stem's output scores too, so that a gate can close before the first block;
            without it every token enters the first block at the first step.
    """

    enabled: bool = False
    order: HaltingOrder = "upstream"
    gamma: float = Field(default=5.0, gt=0, le=1000)
    beta: float = Field(default=-5.0, ge=-1000, le=1000)
    epsilon: float = Field(default=0.01, gt=0, lt=1)
    stem_beta: float | None = Field(default=None, ge=-1000, le=1000)
    learn: bool = False
    stem_score: bool = True
    block_scores: bool = True
    quiet: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> HaltingConfig:
        if self.quiet is not None and not self.stem_score:
            raise ValueError("quiet tokens close by the stem's score: set stem_score true")
        return self

    @property
    def detected(self) -> float | None:
        """Share of tokens that a detector closes; None if there is none at work."""
        return self.quiet if self.enabled else None


class MergingConfig(_Section):
    """Merging of similar tokens between attention and MLP (bipartite soft matching).

    Attributes:
        count: pairs merged per block at most; 0: no limit (then `minimum_similarity` > 0 decides).
        minimum_similarity: cosine similarity below which no pair merges.
        combine: size-weighted mean, maximum, or the larger token.
        similarity: measured on the residual stream or on the attention keys.
        assignment: pairs chosen from the first time step (causal) or from all of them.
        blocks: the blocks that merge, counted from 1 as in `block1`; 0 merges what the stem gives,
            in front of the first gate; None: every block.
        readout: the read-out weights tokens by size, or alike (`token`), merged-away ones with
            their last value too.
    """

    enabled: bool = False
    count: int = Field(default=4, ge=0)
    minimum_similarity: float = Field(default=0.0, ge=0, le=1)
    combine: Literal["mean", "max", "keep"] = "mean"
    similarity: Literal["stream", "keys"] = "stream"
    assignment: Literal["first", "all"] = "first"
    blocks: tuple[int, ...] | None = None
    readout: Literal["size", "token"] = "size"

    @model_validator(mode="after")
    def _bounded(self) -> MergingConfig:
        if self.enabled and self.count == 0 and self.minimum_similarity == 0:
            raise ValueError(
                "count 0 (no limit) would merge every pair: set a count or a minimum_similarity"
            )
        return self


class SelectionConfig(_Section):
    """A rival method that decides which tokens a block processes (`atsnn.rivals`).

    Attributes:
        method: `sparse-spikformer` (a trained selector), `tp-spikformer` (a score, no training),
            `random`; `none` leaves the gates to halting and merging.
        keep: share of tokens that each block keeps, one number per block.
        hidden: hidden width of the trained selector (None: half of the model's width).
        neighbourhood: side of the square of tokens that `tp-spikformer` compares a token with.
    """

    method: Literal["none", "sparse-spikformer", "tp-spikformer", "random"] = "none"
    keep: tuple[float, ...] = ()
    hidden: int | None = Field(default=None, ge=1)
    neighbourhood: int = Field(default=3, ge=3, le=15)

    @property
    def enabled(self) -> bool:
        """True if a rival decides."""
        return self.method != "none"

    @model_validator(mode="after")
    def _shares(self) -> SelectionConfig:
        outside = [share for share in self.keep if not 0 < share <= 1]
        if outside:
            raise ValueError(f"keep {outside}: a share of tokens is above 0 and at most 1")
        if self.neighbourhood % 2 == 0:
            raise ValueError(f"neighbourhood {self.neighbourhood}: it must be odd, as in 3 or 5")
        return self


class QuantizationConfig(_Section):
    """Number formats of the quantised model.

    Attributes:
        pixel_bits: upper bits of each 8-bit pixel that enter the network; the float model sees the
            same levels, so that both have the same input.
        fraction_bits: fractional bits F of the residual stream; when it is not given, 3 if tokens
            are merged by their mean, otherwise 0.
    """

    pixel_bits: int = Field(default=6, ge=1, le=8)
    fraction_bits: int = Field(default=0, ge=0, le=8)


class ModelConfig(_Section):
    """A Spikformer with adaptive tokens.

    Attributes:
        in_channels: channels of the image. image_size: its height and width in pixels.
        classes: number of classes. steps: time steps T. blocks: encoder blocks L. dim: width D.
        heads: attention heads. mlp_ratio: hidden width of the MLP over D.
        tau: membrane time constant in steps. v_threshold, attention_threshold: firing thresholds.
        attention_scale: factor on the attention's coincidence counts.
        events: the input is events, 0 or 1 and another at every time step, in place of one image.
        stem_once: the stem runs one step, and what it fires serves all steps.
    """

    in_channels: int = Field(default=3, ge=1, le=64)
    image_size: tuple[int, int] = (32, 32)
    classes: int = Field(default=10, ge=2)
    steps: int = Field(default=4, ge=1, le=256)
    blocks: int = Field(default=4, ge=1, le=64)
    dim: int = Field(default=384, ge=8, multiple_of=8)
    heads: int = Field(default=12, ge=1)
    mlp_ratio: int = Field(default=4, ge=1, le=16)
    tau: float = Field(default=2.0, gt=1)
    v_threshold: float = Field(default=1.0, gt=0)
    attention_threshold: float = Field(default=0.5, gt=0)
    attention_scale: float = Field(default=0.125, gt=0)
    events: bool = False
    stem_once: bool = False
    halting: HaltingConfig = HaltingConfig()
    merging: MergingConfig = MergingConfig()
    selection: SelectionConfig = SelectionConfig()
    quantization: QuantizationConfig = QuantizationConfig()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens: each of the stem's two pools halves, rounding up."""
        return -(-self.image_size[0] // 4), -(-self.image_size[1] // 4)

    @property
    def tokens(self) -> int:
        """Number of tokens N."""
        return self.grid[0] * self.grid[1]

    def merges_at(self, index: int) -> bool:
        """True if block `index` (counted from 0) merges tokens."""
        chosen = self.merging.blocks
        return self.merging.enabled and (chosen is None or index + 1 in chosen)

    @property
    def merges_stem(self) -> bool:
        """True if tokens merge behind the stem."""
        return self.merging.enabled and 0 in (self.merging.blocks or ())

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if min(self.image_size) < 4:
            raise ValueError(f"image_size {list(self.image_size)}: needs at least 4 x 4 pixels")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads")
        outside = [b for b in self.merging.blocks or () if not 0 <= b <= self.blocks]
        if outside:
            raise ValueError(
                f"merging.blocks {outside}: the model has blocks 1 to {self.blocks}, and 0 for the "
                "stem"
            )
        if self.merges_stem and self.merging.similarity == "keys":
            raise ValueError("merging.blocks 0: the stem has no keys; use similarity stream")
        if self.merging.enabled and self.tokens < 2:
            raise ValueError(
                f"merging needs at least 2 tokens, image_size {list(self.image_size)} gives 1"
            )
        self._check_selection()
        if self.events and self.stem_once:
            raise ValueError("stem_once needs an input that stands still; events do not")
        object.__setattr__(self, "quantization", self._number_formats())
        return self

    def _number_formats(self) -> QuantizationConfig:
        """The formats with what was left open filled in."""
        given = self.quantization
        if self.events and given.pixel_bits != 1 and "pixel_bits" in given.model_fields_set:
            raise ValueError(f"quantization.pixel_bits {given.pixel_bits}: an event has 1 bit")
        merged_mean = self.merging.enabled and self.merging.combine == "mean"
        left_open = merged_mean and "fraction_bits" not in given.model_fields_set
        pixels = 1 if self.events else given.pixel_bits
        if pixels == given.pixel_bits and not left_open:
            return given
        return QuantizationConfig(
            pixel_bits=pixels, fraction_bits=3 if left_open else given.fraction_bits
        )

    def _check_selection(self) -> None:
        if not self.selection.enabled:
            return
        if self.halting.enabled or self.merging.enabled:
            raise ValueError(
                f"selection.method {self.selection.method} decides every gate by itself: switch "
                "halting and merging off (enabled: false)"
            )
        if len(self.selection.keep) != self.blocks:
            raise ValueError(
                f"selection.keep has {len(self.selection.keep)} shares, the model {self.blocks} "
                "blocks: give one share per block"
            )


class DataConfig(_Section):
    """Which images are used.

    Attributes:
        format: layout of the data folder; `auto` looks at what it holds.
        time: of events: `kept`, or `collapsed` into one frame that every time step shows.
        resize: scale images of another size to the model's; otherwise they are refused.
        train_images, test_images: use only the first so many (None: all).
        validation_images: so many training images are held out, the same for every seed; training
            then watches these and never looks at the test images.
    """

    format: DataFormat = "auto"
    time: Literal["kept", "collapsed"] = "kept"
    resize: bool = False
    train_images: int | None = Field(default=None, ge=1)
    test_images: int | None = Field(default=None, ge=1)
    validation_images: int = Field(default=0, ge=0)


class AugmentConfig(_Section):
    """Augmentation of training images; every draw is a function of (seed, epoch, batch).

    Attributes:
        shift: largest random shift in pixels (zero padding), drawn per image.
        flip: mirror half of the images.
        randaugment: RandAugment operations per image (0: none). magnitude: its strength, 0 to 10.
        random_erase: probability of erasing a rectangle.
        mixup: parameter of the Beta distribution that mixes pairs of images (0: none).
        mixup_epochs: mix only during so many epochs (None: all).
    """

    shift: int = Field(default=0, ge=0)
    flip: bool = False
    randaugment: int = Field(default=0, ge=0, le=8)
    magnitude: int = Field(default=9, ge=0, le=10)
    random_erase: float = Field(default=0.0, ge=0, le=1)
    mixup: float = Field(default=0.0, ge=0)
    mixup_epochs: int | None = Field(default=None, ge=0)


class TrainConfig(_Section):
    """Optimisation, losses and bookkeeping.

    Attributes:
        lr, min_lr: peak and final learning rate (linear warm-up, cosine). weight_decay: of AdamW,
            on weights of two and more dimensions.
        clip_norm: largest norm of the gradient (0: no limit).
        ponder_weight: of the mean ponder (active cells + remainder, per token).
        gate_weight: of the mean gate, above `gate_target` (share of open gates that costs nothing).
        operation_weight: of the synaptic operations, as a share of those of a network in which
            every neuron fires.
        early_weight: of the cross-entropy of the read-outs over the first 1, 2, ... T-1 steps, for
            images that leave before the last step.
        ratio_weight: of the squared difference between the share of tokens that a trained selector
            keeps and `model.selection.keep` (SparseSpikformer: 2).
        distill_weight: of the KL divergence from the class probabilities of the model in `initial`
            (SparseSpikformer: 0.5).
        prior_weight: of the KL divergence between the halting scores over the cells (l, t) and a
            Gaussian prior centred at `prior_center` (0: first cell, 1: last).
        freeze_stem: the stem's four convolutions keep weights and statistics, which leaves them out
            of the backward pass; the position branch, the blocks and the read-out are trained.
        quantized: train the quantised model (straight-through), starting from `initial`.
        initial: checkpoint to start from (its weights; float unless it is quantised too).
        epoch_steps: updates in an epoch at most, on images drawn anew in each (None: all images).
        checkpoint_steps: also write a checkpoint every so many steps (0: after epochs only).
        eval_images: evaluate on the first so many test images after each epoch but the last, which
            takes all of them (None: always all).
        eval_whole: false: `eval_images` are enough for the last epoch too.
        threads: torch threads (None: torch's choice).
        device: `auto` takes a CUDA GPU where there is one.
        precision: `bf16` computes convolutions and linear maps in bfloat16 (mixed precision).
        accumulate: parts in which each process computes its share of a batch, one after another;
            each part has batch norm statistics of its own.
    """

    epochs: int = Field(default=300, ge=1)
    batch: int = Field(default=128, ge=1)
    eval_batch: int = Field(default=256, ge=1)
    lr: float = Field(default=5e-4, gt=0)
    min_lr: float = Field(default=1e-5, ge=0)
    weight_decay: float = Field(default=0.06, ge=0)
    warmup_epochs: float = Field(default=20, ge=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    clip_norm: float = Field(default=0.0, ge=0)
    ponder_weight: float = Field(default=5e-4, ge=0)
    gate_weight: float = Field(default=0.0, ge=0)
    gate_target: float = Field(default=0.0, ge=0, le=1)
    operation_weight: float = Field(default=0.0, ge=0)
    early_weight: float = Field(default=0.0, ge=0)
    ratio_weight: float = Field(default=2.0, ge=0)
    distill_weight: float = Field(default=0.0, ge=0)
    prior_weight: float = Field(default=0.0, ge=0)
    prior_center: float = Field(default=0.5, ge=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    freeze_stem: bool = False
    quantized: bool = False
    initial: str | None = None
    epoch_steps: int | None = Field(default=None, ge=1)
    checkpoint_steps: int = Field(default=0, ge=0)
    eval_images: int | None = Field(default=None, ge=1)
    eval_whole: bool = True
    threads: int | None = Field(default=None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    accumulate: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.quantized and self.precision != "float32":
            raise ValueError(
                "quantized training computes exact integers, which bf16 rounds: use precision "
                "float32"
            )
        if self.freeze_stem and self.operation_weight:
            raise ValueError(
                f"operation_weight {self.operation_weight} is mostly about the stem's operations, "
                "which freeze_stem keeps as they are: choose one of them"
            )
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch {self.batch} does not divide into accumulate {self.accumulate}"
            )
        return self


class StageConfig(_Section):
    """One stage of a run: what it changes against the stage before it (the first: against the run).

    A stage starts from the weights of the one before it.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    model: dict[str, Any] = {}
    augment: dict[str, Any] = {}
    train: dict[str, Any] = {}

    @model_validator(mode="after")
    def _starts_from_the_stage_before(self) -> StageConfig:
        if "initial" in self.train:
            raise ValueError("train.initial belongs to the run; a stage starts from the one before")
        return self


class RunConfig(_Section):
    """Everything that determines a training run, apart from the images themselves.

    `stages` runs one training after another, as in: all tokens, then adaptive, then quantised.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    stages: tuple[StageConfig, ...] = ()

    def stage_configs(self) -> dict[str, RunConfig]:
        """Configuration of each stage by name; without stages just one, named `run`."""
        if not self.stages:
            return {"run": self}
        values = self.model_dump(exclude_unset=True, exclude={"stages"})
        resolved = {}
        for stage in self.stages:
            if stage.name in resolved:
                raise ConfigError(f"stages: two are named {stage.name}")
            values = merged(values, stage.model_dump(exclude={"name"}))
            resolved[stage.name] = parse(RunConfig, values, f"stage {stage.name}")
        return resolved

    @model_validator(mode="after")
    def _stages_are_valid(self) -> RunConfig:
        made = self.augment
        if self.model.events and (made.randaugment or made.random_erase or made.mixup):
            raise ValueError(
                "augment: randaugment, random_erase and mixup are for images; events take "
                "shift and flip"
            )
        self.stage_configs()
        return self


Section = TypeVar("Section", bound=_Section)


def parse(section: type[Section], values: Mapping[str, Any], origin: str) -> Section:
    """Validate `values` as a section.

    Raises:
        ConfigError: names `origin` (a file, an option), the first wrong key and what is allowed.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_first_mistake(section, error)}") from None


def _first_mistake(section: type[_Section], error: ValidationError) -> str:
    details = error.errors(include_url=False)
    text = _mistake(section, details[0])
    others = len(details) - 1
    return f"{text} (and {others} more mistake{'s' if others > 1 else ''})" if others else text


def _mistake(section: type[_Section], detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        known = sorted(_section_at(section, path[:-1]).model_fields)
        return f"unknown key {key}; known here: {', '.join(known)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key} = {detail['input']!r}: {message[:1].lower()}{message[1:]}"


def _section_at(section: type[_Section], path: Iterable[str]) -> type[_Section]:
    for name in path:
        if name not in section.model_fields:  # place in a list of sections, or key of a mapping
            continue
        annotation = section.model_fields[name].annotation
        for part in (annotation, *get_args(annotation)):
            if isinstance(part, type) and issubclass(part, _Section):
                section = part
    return section


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; `ConfigError` if the file is missing, unreadable or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    return _yaml_mapping(text, str(path))


def _yaml_mapping(text: str, origin: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates that do not exist
        reason = " ".join(str(error).split())
        raise ConfigError(f"{origin}: not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{origin}: holds no mapping of keys; it needs model, data, augment, train"
        )
    return values


def preset_names() -> list[str]:
    """Names of the built-in presets."""
    folder = resources.files("atsnn") / "presets"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def read_preset(name: str) -> dict[str, Any]:
    """Values of a built-in preset; `ConfigError` names the known ones."""
    if name not in preset_names():
        raise ConfigError(f"no preset {name!r}; there are: {', '.join(preset_names())}")
    text = (resources.files("atsnn") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return _yaml_mapping(text, f"preset {name}")


def load_preset(name: str, changes: Iterable[str] = ()) -> RunConfig:
    """A built-in preset with `key=value` changes (see `apply_changes`)."""
    return parse(RunConfig, apply_changes(read_preset(name), changes), f"preset {name}")


def load_config(path: Path, changes: Iterable[str] = ()) -> RunConfig:
    """A YAML configuration with `key=value` changes (see `apply_changes`)."""
    return parse(RunConfig, apply_changes(read_yaml(path), changes), str(path))


def apply_changes(values: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Set dotted keys, as in `train.lr=1e-3` or `model.halting.enabled=true` (values are YAML).

    Raises:
        ConfigError: a change without `=`, or through a key that holds no section.
    """
    result = copy.deepcopy(dict(values))
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator or not key:
            raise ConfigError(f"change {change!r}: write key=value, as in train.lr=0.001")
        *parents, last = key.split(".")
        section = result
        if parents[:1] == ["stages"] and isinstance(result.get("stages"), list):
            section, parents = _stage(result["stages"], parents[1:], change), parents[2:]
        for parent in parents:
            section = _inner_section(section, parent, change)
        section[last] = _scalar(text)
    return result


def _stage(stages: list[Any], path: list[str], change: str) -> dict[str, Any]:
    """The stage that `stages.<name>` means."""
    by_name = {stage.get("name"): stage for stage in stages if isinstance(stage, dict)}
    if not path or path[0] not in by_name:
        known = ", ".join(str(name) for name in by_name)
        raise ConfigError(f"change {change!r}: write stages.NAME.key=value; stages: {known}")
    return by_name[path[0]]


def _inner_section(section: dict[str, Any], name: str, change: str) -> dict[str, Any]:
    inner = section.setdefault(name, {})
    if not isinstance(inner, dict):
        raise ConfigError(f"change {change!r}: {name} is a value, not a section")
    return inner


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the nested `changes` laid over it."""
    result = dict(values)
    for key, change in changes.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(change, Mapping):
            result[key] = merged(old, change)
        else:
            result[key] = change
    return result


def _scalar(text: str) -> Any:
    if "e" in text.lower():  # YAML 1.1 reads 1e-3 as a string; users mean a number
        with contextlib.suppress(ValueError):
            return float(text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration, every default written out.

    Of a run with stages only what was given: what a stage leaves open depends on the stage (as
    `fraction_bits` does), and each stage's own file has its defaults.
    """
    given_only = isinstance(config, RunConfig) and bool(config.stages)
    values = config.model_dump(mode="json", exclude_unset=given_only)
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def differences(ours: BaseModel, theirs: BaseModel) -> list[str]:
    """Dotted keys in which two configurations differ, as `key: ours, not theirs`."""
    return list(_differences(ours.model_dump(mode="json"), theirs.model_dump(mode="json"), ""))


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> Iterable[str]:
    for key, value in ours.items():
        other = theirs.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _differences(value, other, f"{prefix}{key}.")
        elif value != other:
            yield f"{prefix}{key}: {value}, not {other}"
