"""What a quantised model does when it is deployed: accuracy, tokens, events, joules, spikes.

Every number comes from the engine on the compiled graph. The first images are also run by the
quantised torch model, and each of its spikes is compared with the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from atsnn.augment import to_input
from atsnn.data import ImageSet
from atsnn.data.recordings import steps_first
from atsnn.merging import TokenMerging
from atsnn.spikformer import Spikformer
from export.graph import Graph
from export.spikformer import compile_spikformer, model_trace, selection_of
from hardware.energy import CONVENTIONS, cost_of, spiking_row
from hardware.engine import Engine, EngineResult
from hardware.events import EventCounts
from hardware.exits import ExitEngine
from hardware.profile import load_profile
from hardware.sweep.config import DeployConfig
from hardware.verify import StageResult, compare

PROFILES = (*CONVENTIONS, "loihi1", "loihi1_calibrated")
"""Conventions that every cell is priced under; joules of one are not comparable with another's."""
SELECTOR_PROFILE = "45nm-fp32"
"""A rival's decision has no chip form: its multiplications are priced by this convention alone."""
ALL_STEPS = DeployConfig()
EXAMPLES = 12
"""Images whose gates are kept for pictures."""
Masks = dict[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Deployed:
    """One quantised model on one set of images.

    Attributes:
        numbers: columns of the table.
        details: arrays for the pictures: `open` float [L, T, N], mean gate; `class_steps` float
            [classes, L], mean number of steps that a token of such an image is processed in block
            l; `examples` uint8 [L, T, E, N], gates of the first images; `labels` int [E]; with
            merging `partner` int [L, E, N], the token that each was merged into in block l, -1 for
            none, and `stem_partner` int [E, N] where tokens merge behind the stem.
    """

    numbers: dict[str, Any]
    details: dict[str, npt.NDArray]


@dataclass(frozen=True)
class _Run:
    """What the engine says of all images.

    Attributes:
        classes, steps: of each image [B]: its class, and the time steps that were run.
        gates: uint8 [L, T, B, N].
        out_of_range: number of layers whose arithmetic left its range.
        verified: the comparison with the quantised torch model on the first images.
    """

    classes: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    gates: npt.NDArray[np.uint8]
    events: EventCounts
    out_of_range: int
    verified: StageResult


def deploy(
    model: Spikformer,
    images: ImageSet,
    verify_images: int,
    how: DeployConfig = ALL_STEPS,
    tick: Callable[[int, int], None] | None = None,
) -> Deployed:
    """Compile, run, count, price and verify.

    Args:
        model: quantised. images: labelled images. verify_images: so many of them are verified.
        how: with an exit, images leave after the time step at which they are sure; else all run T.
        tick: called with (images done, images in all).

    Raises:
        ExitError: an exit from a model that is not causal in time.
    """
    model.eval()
    pixels = images.batch(torch.arange(len(images))).numpy()
    labels = images.labels.numpy()
    if how.exit_margin is None:
        ran = _run(model, pixels, verify_images, tick)
    else:
        ran = _run_with_exits(model, pixels, verify_images, how.exit_margin, how.exit_decay, tick)
    numbers = {
        "images": len(labels),
        "accuracy": float((ran.classes == labels).mean()),
        "average_tokens": float(ran.gates.mean()),
        "mean_steps": float(ran.steps.mean()),
        **_event_columns(ran.events),
        **_selector_columns(model, ran.gates),
        **_energy_columns(ran.events),
        "verified_images": ran.verified.images,
        "spikes_compared": ran.verified.spikes_compared,
        "spikes_differing": ran.verified.spikes_differing + ran.verified.logits_differing,
        "out_of_range": ran.out_of_range,
    }
    return Deployed(numbers, _details(model, ran.gates, labels, pixels))


def _run(
    model: Spikformer,
    pixels: npt.NDArray[np.uint8],
    verify_images: int,
    tick: Callable[[int, int], None] | None,
) -> _Run:
    graph = compile_spikformer(model)
    engine = Engine(graph)
    chosen = _chosen(model, graph, pixels)
    result = engine.run(_for_engine(model, pixels), selection=chosen, record="none", progress=tick)
    assert result.events is not None  # counting is on
    return _Run(
        result.classes,
        np.full(len(pixels), model.config.steps),
        _gates(model, result, len(pixels)),
        result.events,
        len(result.out_of_range),
        _verified(model, graph, engine, pixels[:verify_images]),
    )


def _run_with_exits(
    model: Spikformer,
    pixels: npt.NDArray[np.uint8],
    verify_images: int,
    margin: float,
    decay: float,
    tick: Callable[[int, int], None] | None,
) -> _Run:
    engine = ExitEngine(model)
    result = engine.run(_for_engine(model, pixels), margin, decay=decay, progress=tick)
    return _Run(
        result.classes,
        result.steps,
        result.gates,
        result.events,
        len(result.out_of_range),
        engine.verify(_for_engine(model, pixels[:verify_images]), margin, decay=decay),
    )


def _for_engine(model: Spikformer, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return steps_first(pixels) if model.config.events else pixels


def _chosen(model: Spikformer, graph: Graph, pixels: npt.NDArray[np.uint8]) -> Masks:
    """What a rival's selection chooses on each image, decided by the quantised model."""
    if not model.selects:
        return {}
    parts: list[npt.NDArray] = []
    bits = model.config.quantization.pixel_bits
    with torch.no_grad():
        for start in range(0, len(pixels), 256):
            batch = torch.from_numpy(pixels[start : start + 256])
            parts.append(model(to_input(batch, bits)).gates[:, 0].numpy())
    masks = np.concatenate(parts, axis=1).astype(np.uint8)
    trace = {f"selections.{index}": mask[None] for index, mask in enumerate(masks)}
    return selection_of(graph, trace)


def _verified(
    model: Spikformer, graph: Graph, engine: Engine, pixels: npt.NDArray[np.uint8]
) -> StageResult:
    images = _for_engine(model, pixels)
    trace = model_trace(model, images)
    ours = engine.run(images, selection=selection_of(graph, trace), count_events=False)
    return compare(graph, trace, ours.trace, names=("quantised torch", "engine"))


def _gates(model: Spikformer, result: EngineResult, images: int) -> npt.NDArray[np.uint8]:
    """Gates in front of each block, uint8 [L, T, B, N]; all open without gates."""
    config = model.config
    if not result.gates:
        return np.ones((config.blocks, config.steps, images, config.tokens), np.uint8)
    return np.stack(list(result.gates.values()))


def _event_columns(events: EventCounts) -> dict[str, float]:
    stem = events.group(lambda node: node.block)["stem"]
    return {
        "sops": events.mean("sops"),
        "stem_sops": stem.mean("sops"),
        "acs": events.mean("acs"),
        "macs": events.mean("macs"),
        "spikes": events.mean("spikes"),
        "neuron_updates": events.mean("updates_active") + events.mean("updates_idle"),
    }


def _selector_columns(model: Spikformer, gates: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Multiplications of a rival's own decision, mean per image, and what they cost."""
    config, arriving, macs = model.config, float(model.config.tokens), 0.0
    for index, selection in enumerate(model.selection_list):
        macs += selection.macs_per_image(config.steps, round(arriving))
        arriving = float(gates[index, 0].sum(1).mean())
    price = load_profile(SELECTOR_PROFILE).energy.multiply_accumulate
    assert price is not None  # a convention of arithmetic has one
    joules = cost_of(macs, price).middle
    return {"selector_macs": macs, f"selector_joules/{SELECTOR_PROFILE}": joules}


def _energy_columns(events: EventCounts) -> dict[str, float]:
    return {
        f"joules/{name}": spiking_row("", events, load_profile(name)).joules_per_image
        for name in PROFILES
    }


def _details(
    model: Spikformer, gates: npt.NDArray[np.uint8], labels: npt.NDArray, pixels: npt.NDArray
) -> dict[str, npt.NDArray]:
    steps = gates.sum(1, dtype=np.int64).mean(2)  # [L, B]
    classes = range(model.config.classes)
    per_class = [
        steps[:, labels == c].mean(1) if (labels == c).any() else np.full(len(steps), np.nan)
        for c in classes
    ]
    details = {
        "open": gates.mean(2),
        "class_steps": np.stack(per_class),
        "examples": gates[:, :, :EXAMPLES],
        "labels": labels[:EXAMPLES],
    }
    if model.config.merging.enabled:
        blocks = [block.merging for block in model.block_list]
        details["partner"] = _partners(model, blocks, pixels[:EXAMPLES])
    if model.stem_merging is not None:
        stem = model.stem_merging.merging
        details["stem_partner"] = _partners(model, [stem], pixels[:EXAMPLES])[0]
    return details


def _partners(
    model: Spikformer, stages: Sequence[TokenMerging | None], pixels: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """The token that each token of each image is merged into at each stage, -1 for none."""
    config = model.config
    found = np.full((len(stages), len(pixels), config.tokens), -1, np.int64)

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: TokenMerging, _inputs: object, output: tuple[Any, ...]) -> None:
            pairs = output[4].pairs.numpy()  # [B, Nb, Na]
            for image, odd, even in np.argwhere(pairs > 0):
                found[index, image, 2 * even] = 2 * odd + 1

        return hook

    handles = [
        merging.register_forward_hook(keep(index))
        for index, merging in enumerate(stages)
        if merging is not None
    ]
    try:
        with torch.no_grad():
            model(to_input(torch.from_numpy(pixels), config.quantization.pixel_bits))
    finally:
        for handle in handles:
            handle.remove()
    return found
