"""The training loop: exact resume, atomic checkpoints, a log per epoch.

Everything random is a function of (seed, epoch, step), or drawn from generators whose states are
saved, so that a run that was killed and resumed ends in the same bits as one that was not.

A run's folder holds `config.yaml` (resolved), `log.csv`, `model.safetensors` (weights of the
last finished epoch) and `state.safetensors` (all that is needed to go on). With stages, each has a
folder of that kind and the last stage's model is copied to the top.
"""

from __future__ import annotations

import csv
import io
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils import deterministic

from atsnn.augment import Augmentation, Batch, epoch_order, to_input
from atsnn.checkpoint import (
    MODEL_FILE,
    Checkpoint,
    load_tensors,
    read_checkpoint,
    read_tensors,
    save_checkpoint,
    write_tensors,
)
from atsnn.config import (
    HaltingConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    differences,
    load_config,
    to_yaml,
)
from atsnn.data import Dataset, ImageSet, fingerprint
from atsnn.distributed import (
    average_gradients,
    local_device,
    process_group,
    processes,
    rank,
    same_everywhere,
    sum_over_processes,
    wait_for_all,
)
from atsnn.early_readouts import early_loss, early_readouts
from atsnn.errors import CheckpointError, ConfigError, DatasetError, TrainingError
from atsnn.evaluation import Evaluation, evaluate
from atsnn.files import write_atomically
from atsnn.frozen_stem import freeze_stem
from atsnn.losses import selection_loss, teacher_loss, total_loss
from atsnn.memory import kept_memory
from atsnn.operations import operation_share
from atsnn.progress import Meter, duration, say
from atsnn.quantization import quantize_model
from atsnn.quiet import detect_quiet_tokens, keep_detector
from atsnn.spikformer import ModelOutput, Spikformer, score_counts
from atsnn.teacher import teacher_of

CONFIG_FILE, LOG_FILE, STATE_FILE = "config.yaml", "log.csv", "state.safetensors"
_STATE = "atsnn-training"
# Read and set by name: torch makes it a property of the module, which type checkers do not see.
_FILL = "fill_uninitialized_memory"
SEEN_BY_DETECTOR = 500
"""Training images by which a detector of quiet tokens is set."""
_MUST_AGREE = ("in_channels", "classes", "blocks", "dim", "heads", "mlp_ratio")


@dataclass
class EpochTotals:
    """Sums over the steps of one epoch so far."""

    images: int = 0
    loss: float = 0.0
    correct: int = 0
    tokens: float = 0.0


@dataclass
class TrainingState:
    """Where a run is: the next step to take, and what has been logged."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    totals: EpochTotals = field(default_factory=EpochTotals)
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    config: RunConfig,
    dataset: Dataset,
    folder: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    memory: Path | None = None,
) -> Path:
    """Train as configured, all stages; returns the model file.

    Under `torchrun` all processes call it with the same arguments, on a folder that all of them can
    read; the first one writes.

    Args:
        folder: of the run. resume: go on with what is there. memory: folder that keeps what the
            teacher and a frozen stem answer (see `atsnn.answers`), for further runs with this seed.

    Raises:
        TrainingError: the folder holds a run already (without `resume`), or a loss is not finite.
        ConfigError: the run there has another configuration.
        CheckpointError: a checkpoint cannot be read or written.
    """
    with process_group(_device(config.train)):
        screen = (console or Console(stderr=True)) if rank() == 0 else Console(quiet=True)
        _claim(folder, config, resume)
        initial = Path(config.train.initial) if config.train.initial else None
        for name, stage in config.stage_configs().items():
            place = folder / name if config.stages else folder
            if config.stages:
                say(screen, f"stage {name}")
                _claim(place, stage, True)
            with _reproducible(stage.train):
                run = Run(stage, dataset, place, initial, screen, memory)
                initial = run.train()
        if config.stages and initial is not None:
            _write(folder / MODEL_FILE, initial.read_bytes())
        wait_for_all()
    return folder / MODEL_FILE


def _claim(folder: Path, config: RunConfig, resume: bool) -> None:
    """Write the resolved configuration, or compare it with the one that is there.

    A configuration beside which nothing was trained yet (a start that failed) is replaced. Only the
    first process does so.
    """
    if rank() == 0:
        _claim_first(folder, config, resume)
    wait_for_all()


def _claim_first(folder: Path, config: RunConfig, resume: bool) -> None:
    path = folder / CONFIG_FILE
    if not path.exists() or not any(folder.rglob(STATE_FILE)):
        _write(path, to_yaml(config).encode())
        return
    if not resume:
        raise TrainingError(
            f"{folder} holds a run already: go on with --resume, or choose another folder"
        )
    found = differences(load_config(path), config)
    if found:
        raise ConfigError(f"{path} is of another configuration: {'; '.join(found)}")


def _write(path: Path, data: bytes) -> None:
    """Write a file whole; of several processes the first one does."""
    if rank() > 0:
        return
    try:
        write_atomically(path, data)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextmanager
def _reproducible(config: TrainConfig) -> Iterator[None]:
    """Deterministic algorithms, the configured threads and seeds; settings are restored after."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = getattr(deterministic, _FILL)
    if config.threads:
        torch.set_num_threads(config.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(deterministic, _FILL, False)
    torch.manual_seed(config.seed)
    try:
        with kept_memory():
            yield
    finally:
        setattr(deterministic, _FILL, fill)
        torch.use_deterministic_algorithms(strict)
        torch.set_num_threads(threads)


def initial_model(config: RunConfig, initial: Path | None, images: ImageSet) -> Spikformer:
    """The model that training starts from: fresh, or with the weights of a checkpoint.

    Args:
        images: to train on; a detector of quiet tokens is set by some of them.

    Raises:
        ConfigError: quantised training, quiet tokens or a frozen stem without a checkpoint.
        CheckpointError: a checkpoint of another shape.
    """
    torch.manual_seed(config.train.seed)
    if initial is None:
        if config.train.quantized:
            raise ConfigError(
                "train.quantized needs trained weights to start from: set train.initial to a "
                "checkpoint (quantised training from scratch starts from meaningless statistics)"
            )
        if config.train.freeze_stem:
            raise ConfigError(
                "train.freeze_stem keeps the weights of a trained stem: set train.initial to a "
                "checkpoint"
            )
        if config.model.halting.detected is not None:
            raise ConfigError(
                "halting.quiet counts the spikes of a trained stem: set train.initial to a "
                "checkpoint of all tokens"
            )
        return Spikformer(config.model)
    return _started_from(read_checkpoint(initial), config, images)


def _started_from(checkpoint: Checkpoint, config: RunConfig, images: ImageSet) -> Spikformer:
    _require_same_shape(checkpoint, config.model)
    if checkpoint.quantized and not config.train.quantized:
        raise CheckpointError(
            f"{checkpoint.path} is quantised; set train.quantized: true, or start from a float one"
        )
    model = Spikformer(config.model)
    if checkpoint.quantized:
        model = quantize_model(model)
    own = model.state_dict()
    tensors = {k: v for k, v in checkpoint.tensors.items() if k in own or not _is_score(k)}
    for name, value in own.items():
        if _is_score(name) and (name not in tensors or not _keeps(name, checkpoint, config.model)):
            tensors[name] = value
    load_tensors(model, tensors, str(checkpoint.path))
    share = config.model.halting.detected
    if share is not None and not _keeps_scores(checkpoint, config.model):
        if checkpoint.quantized:
            raise ConfigError(
                f"halting.quiet starts from a float model, {checkpoint.path} is quantised; start "
                "from the float one"
            )
        detect_quiet_tokens(model, _some(images, config), share)
    return quantize_model(model) if config.train.quantized else model


def _some(images: ImageSet, config: RunConfig) -> Tensor:
    """A few hundred images from all over the set, as the model takes them."""
    indices = torch.linspace(0, len(images) - 1, min(SEEN_BY_DETECTOR, len(images))).long()
    return to_input(images.batch(indices), config.model.quantization.pixel_bits)


def _is_score(name: str) -> bool:
    return name.startswith(("scores.", "selections.", "stem_merging."))


def _keeps(name: str, checkpoint: Checkpoint, model: ModelConfig) -> bool:
    """Whether a tensor that decides about tokens is the checkpoint's; a score that is switched on
    or off is not, while the others are.
    """
    if not _keeps_scores(checkpoint, model):
        return False
    if not name.startswith("scores."):
        return True
    index = int(name.split(".")[1])
    return score_counts(checkpoint.config, index) == score_counts(model, index)


def _keeps_scores(checkpoint: Checkpoint, model: ModelConfig) -> bool:
    """What decides about tokens is kept unless the configuration asks for another one."""
    theirs, ours = checkpoint.config.halting, model.halting
    if model.selection.enabled:
        return checkpoint.config.selection.model_dump(exclude={"keep"}) == (
            model.selection.model_dump(exclude={"keep"})
        )
    return ours.enabled and theirs.enabled and _start_of_scores(theirs) == _start_of_scores(ours)


def _start_of_scores(halting: HaltingConfig) -> tuple[float | None, ...]:
    return halting.gamma, halting.beta, halting.stem_beta, halting.quiet


def _require_same_shape(checkpoint: Checkpoint, model: ModelConfig) -> None:
    found = [
        f"{name}: {getattr(checkpoint.config, name)}, not {getattr(model, name)}"
        for name in _MUST_AGREE
        if getattr(checkpoint.config, name) != getattr(model, name)
    ]
    if found:
        raise CheckpointError(f"{checkpoint.path} is of another configuration: {'; '.join(found)}")


class Run:
    """One stage of training in one folder; goes on where its state file ends.

    Args:
        config: resolved, of this stage. initial: checkpoint to start from. memory: as in `train`.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        folder: Path,
        initial: Path | None,
        console: Console,
        memory: Path | None,
    ) -> None:
        self.config, self.folder, self.console = config, folder, console
        self.train_images = dataset.train
        self.watched, self.watched_images = dataset.watched
        self.device = local_device(_device(config.train))
        self.shares = _shares(config.train)
        self.steps = len(self.train_images) // config.train.batch
        if not self.steps:
            raise DatasetError(
                f"{dataset.location}: {len(self.train_images)} training images are less than one "
                f"batch of {config.train.batch} (train.batch)"
            )
        if config.train.epoch_steps is not None:
            self.steps = min(self.steps, config.train.epoch_steps)
        self.state = TrainingState()
        saved = self._saved()
        model = _empty_model(config) if saved else initial_model(config, initial, dataset.train)
        self.model = model.to(self.device).train()
        same_everywhere(self.model.state_dict().values())
        self.teacher = teacher_of(config.train, memory, self.device)
        self.optimizer = _optimizer(self.model, config.train)
        self.augmentation = Augmentation(
            config.augment, config.model.classes, config.train.label_smoothing, config.train.seed
        )
        if saved:
            self._restore(*saved)
        if config.train.freeze_stem:
            freeze_stem(self.model, memory)
        if config.model.halting.detected is not None:
            keep_detector(self.model, self.optimizer)

    def train(self) -> Path:
        """Run the epochs that are left; returns the model file."""
        config = self.config.train
        quick = self.watched_images
        if config.eval_images is not None and config.eval_images < len(quick):
            quick = quick.first(config.eval_images)
        total = config.epochs * self.steps
        done = self.state.epoch * self.steps + self.state.step
        with Meter("train", total, self.console, done) as meter:
            while self.state.epoch < config.epochs:
                self._epoch(meter)
                last = config.eval_whole and self.state.epoch == config.epochs - 1
                self._end_epoch(self.watched_images if last else quick)
        return self.folder / MODEL_FILE

    def _epoch(self, meter: Meter) -> None:
        state, every = self.state, self.config.train.checkpoint_steps
        order = epoch_order(len(self.train_images), self.config.train.seed, state.epoch)
        batches = order.split(self.config.train.batch)
        start = time.monotonic()
        while state.step < self.steps:
            loss = self._step(batches[state.step])
            state.step += 1
            meter.advance(note=f"epoch {state.epoch + 1}, loss {loss:.3f}")
            if every and state.step % every == 0 and state.step < self.steps:
                start = self._count_seconds(start)
                self._save_state()
        self._count_seconds(start)

    def _count_seconds(self, start: float) -> float:
        now = time.monotonic()
        self.state.seconds += now - start
        return now

    def _step(self, indices: Tensor) -> float:
        config, state = self.config, self.state
        batch = self.augmentation(
            self.train_images.batch(indices),
            self.train_images.labels[indices],
            state.epoch,
            state.step,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.train, self.steps, state.epoch, state.step)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.stack([self._backward(batch, share) for share in self.shares]).sum(0)
        average_gradients(self.model.parameters())
        if config.train.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.train.clip_norm)
        self.optimizer.step()
        value, correct, tokens = sum_over_processes(sums).tolist()
        value, tokens = value / processes(), tokens / processes()
        if not math.isfinite(value):
            raise TrainingError(
                f"loss is {value} in epoch {state.epoch + 1}, step {state.step + 1}: lower "
                f"train.lr ({config.train.lr}) or set train.clip_norm (1.0 is a start)"
            )
        totals = state.totals
        totals.images += len(indices)
        totals.loss += value * len(indices)
        totals.correct += int(correct)
        totals.tokens += tokens * len(indices)
        return value

    def _backward(self, batch: Batch, share: slice) -> Tensor:
        """Add the gradients of one part of a batch.

        Returns loss and average tokens, as parts of their means over all parts of this process, and
        the number of correct images between them: float64 [3].
        """
        config = self.config
        images = batch.images[share].to(self.device)
        images = to_input(images, config.model.quantization.pixel_bits)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"
        ):
            output, operations, early = self._watched(images)
        targets = batch.targets[share].to(self.device)
        loss = total_loss(output, targets, config.train, self.model.adaptive)
        loss = loss + config.train.operation_weight * operations
        if config.train.early_weight:
            loss = loss + config.train.early_weight * early_loss(early, targets)
        loss = loss + selection_loss(output, config.model.selection, config.train)
        if self.teacher is not None:
            distance = teacher_loss(output, self.teacher(images))
            loss = loss + config.train.distill_weight * distance
        loss = loss / len(self.shares)
        loss.backward()
        correct = output.logits.detach().argmax(1).cpu() == batch.labels[share]
        tokens = float(output.average_tokens) / len(self.shares)
        found = [float(loss.detach()), float(correct.sum()), tokens]
        return torch.tensor(found, dtype=torch.float64, device=self.device)

    def _watched(self, images: Tensor) -> tuple[ModelOutput, Tensor | float, list[Tensor]]:
        """The model's output; share of operations and early read-outs, where a loss asks."""
        config = self.config.train
        with ExitStack() as stack:
            share = readouts = None
            if config.operation_weight:
                share = stack.enter_context(operation_share(self.model))
            if config.early_weight:
                readouts = stack.enter_context(early_readouts(self.model))
            output = self.model(images)
            return output, share() if share else 0.0, readouts() if readouts else []

    def _end_epoch(self, images: ImageSet) -> None:
        """Evaluate, log and save; the first process does so while the others wait."""
        if rank() == 0:
            evaluation = evaluate(self.model, images, self.config.train.eval_batch)
            row = self._row(evaluation)
            self.state.history.append(row)
            self._next_epoch()
            self._write_log()
            self._save_model(evaluation)
            self._save_state()
            self._report(row, evaluation)
        else:
            self._next_epoch()
        wait_for_all()

    def _next_epoch(self) -> None:
        self.state.epoch, self.state.step = self.state.epoch + 1, 0
        self.state.totals, self.state.seconds = EpochTotals(), 0.0

    def _row(self, evaluation: Evaluation) -> dict[str, float]:
        """The log's row of the epoch that ends."""
        state, totals = self.state, self.state.totals
        return {
            "epoch": state.epoch + 1,
            "seconds": round(state.seconds, 1),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_loss": totals.loss / totals.images,
            "train_accuracy": totals.correct / totals.images,
            "train_tokens": totals.tokens / totals.images,
            **self._watched_columns(evaluation),
            **{f"rate/{name}": rate for name, rate in evaluation.rates.items()},
        }

    def _watched_columns(self, evaluation: Evaluation) -> dict[str, float]:
        return {
            f"{self.watched}_images": evaluation.images,
            f"{self.watched}_accuracy": evaluation.accuracy,
            f"{self.watched}_tokens": evaluation.average_tokens,
        }

    def _report(self, row: dict[str, float], evaluation: Evaluation) -> None:
        speed = self.steps * self.config.train.batch / max(row["seconds"], 1e-9)
        say(
            self.console,
            f"epoch {row['epoch']:.0f}/{self.config.train.epochs}  loss {row['train_loss']:.3f}  "
            f"accuracy {row['train_accuracy']:.2%} train, {evaluation.accuracy:.2%} {self.watched} "
            f"({evaluation.images})  tokens {evaluation.average_tokens:.1%}  "
            f"{duration(row['seconds'])} ({speed:.0f} images/s)",
        )

    def _write_log(self) -> None:
        text = io.StringIO()
        columns = list(self.state.history[-1])  # rows of a resumed run come back sorted by name
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.state.history)
        _write(self.folder / LOG_FILE, text.getvalue().encode())

    def _save_model(self, evaluation: Evaluation) -> None:
        notes = {
            "epochs": self.state.epoch,
            "train": self.config.train.model_dump(mode="json"),
            **self._watched_columns(evaluation),
        }
        save_checkpoint(self.folder / MODEL_FILE, self.model, self.config.model, notes)

    def _save_state(self) -> None:
        if rank() > 0:
            return
        header = {
            "state": asdict(self.state),
            "data": fingerprint(self.train_images),
            "random": _random_states(),
        }
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors["torch_random"] = torch.get_rng_state()
        write_tensors(self.folder / STATE_FILE, _STATE, header, tensors)

    def _saved(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        path = self.folder / STATE_FILE
        return read_tensors(path, _STATE) if path.exists() else None

    def _restore(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        origin = str(self.folder / STATE_FILE)
        ours = fingerprint(self.train_images)
        if header["data"] != ours:
            raise DatasetError(
                f"{origin}: was trained on other images ({header['data']}; here: {ours})"
            )
        load_tensors(self.model, _below(tensors, "model."), origin)
        for name, parameter in self.model.named_parameters():
            moments = {
                key.split(".", 1)[0]: value
                for key, value in _below(tensors, "optimizer.").items()
                if key.split(".", 1)[1] == name
            }
            if moments:
                self.optimizer.state[parameter] = {
                    k: v if k == "step" else v.to(self.device) for k, v in moments.items()
                }
        state = dict(header["state"])
        totals = EpochTotals(**state.pop("totals"))
        self.state = TrainingState(totals=totals, **state)
        _restore_random(header["random"], tensors["torch_random"])


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _empty_model(config: RunConfig) -> Spikformer:
    """A model of the right structure, whose weights are about to be replaced."""
    model = Spikformer(config.model)
    return quantize_model(model) if config.train.quantized else model


def _device(config: TrainConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but torch finds no CUDA GPU here; use auto or cpu")
    return torch.device(config.device)


def _shares(config: TrainConfig) -> list[slice]:
    """Which images of a batch this process takes, in parts that it computes one after another.

    Raises:
        ConfigError: the batch does not divide.
    """
    parts = processes() * config.accumulate
    if config.batch % parts:
        raise ConfigError(
            f"train.batch {config.batch} does not divide into {processes()} processes times "
            f"train.accumulate {config.accumulate}: use a multiple of {parts}"
        )
    size = config.batch // parts
    first = rank() * config.accumulate
    return [slice(i * size, (i + 1) * size) for i in range(first, first + config.accumulate)]


def _optimizer(model: Spikformer, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weights decay, while biases, norms and halting scores do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr)


def learning_rate(config: TrainConfig, steps: int, epoch: int, step: int) -> float:
    """Linear warm-up, then a cosine from `lr` to `min_lr`; `steps` are those of one epoch."""
    done = epoch * steps + step
    warmup = config.warmup_epochs * steps
    if done < warmup:
        return config.lr * (done + 1) / (warmup + 1)
    share = (done - warmup) / max(1.0, config.epochs * steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def _random_states() -> dict[str, Any]:
    """Global generators of Python and numpy in JSON types."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (third-party code draws from it)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def _restore_random(states: dict[str, Any], torch_state: Tensor) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))  # noqa: NPY002 (as above)
    torch.set_rng_state(torch_state)
