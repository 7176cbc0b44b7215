"""Exit over time steps: an image leaves the network once its read-out is sure.

After step t the difference between the two largest logits of the read-out over steps 1 to t is held
against a margin. Where it is large enough, later steps are neither run nor counted. What an image
does until then is what the network for its first t steps does (`atsnn.exits`), so that an exit is
a choice among networks that the engine runs anyway, and is verified like them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from atsnn.errors import ExitError
from atsnn.exits import first_steps
from atsnn.quantization import quantize_model
from atsnn.spikformer import Spikformer
from export.spikformer import compile_spikformer, model_trace
from hardware.engine import Engine, EngineResult, image_axis, select
from hardware.engine.runner import Record
from hardware.errors import EngineError
from hardware.events import EventCounts, join
from hardware.verify import ENGINE, TORCH, StageResult, compare

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ExitResult:
    """What B images did in a network of T steps that each leaves once it is sure.

    Attributes:
        logits: float64 [B, classes], of the step after which the image left.
        steps: int64 [B], that step, 1 to T.
        gates: uint8 [L, T, B, N], 1 where a block processed a token: 0 behind the exit, and 1 in
            front of it in a network without gates.
        events: of the steps that were run; each attention in the order cheaper over all images.
        out_of_range: the layers whose arithmetic left its range at least once.
    """

    logits: npt.NDArray[np.float64]
    steps: npt.NDArray[np.int64]
    gates: npt.NDArray[np.uint8]
    events: EventCounts
    out_of_range: tuple[str, ...]

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """Class of each image, int64 [B]: the largest logit, the lowest index among equals."""
        return np.argmax(self.logits, axis=1)

    @property
    def mean_steps(self) -> float:
        """Mean over images of the steps that were run."""
        return float(self.steps.mean())

    @property
    def average_tokens(self) -> float:
        """Mean over images of open gates / (L * T * N)."""
        return float(self.gates.mean())

    @property
    def leaving(self) -> npt.NDArray[np.int64]:
        """Images that leave after each step, int64 [T]."""
        return np.bincount(self.steps, minlength=self.gates.shape[1] + 1)[1:]


class ExitEngine:
    """The networks for the first 1 to T steps of a model, compiled and planned once.

    Args:
        model: a Spikformer; a float one is quantised.

    Raises:
        ExitError: the model is not causal in time.
        UnsupportedModuleError, GraphError: see `export.capture.capture`.
        EngineError: the engine cannot run it.
    """

    def __init__(self, model: Spikformer) -> None:
        self.config = model.config
        quantized = quantize_model(model).eval()
        self._models = [first_steps(quantized, t + 1) for t in range(model.config.steps)]
        self._engines = [Engine(compile_spikformer(each)) for each in self._models]
        for engine in self._engines:  # they run in turn
            engine.buffers = self._engines[0].buffers

    def run(
        self,
        images: Images,
        margin: float,
        *,
        decay: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> ExitResult:
        """Run images until each is sure.

        An image that stays for another step is run again from the first one, since a run keeps no
        state; counted is the run that it leaves with.

        Args:
            images: uint8 [B, C, H, W], or events of 0 and 1, [T, B, C, H, W].
            margin: difference between the two largest logits, above 0; infinite: all run T steps.
            decay: factor on the margin from each step to the next, at most 1: a read-out over more
                steps is more often right at the same difference.
            progress: called with (images that have left, images in all) after each step.

        Raises:
            ExitError: a margin that is not above 0, or a decay outside of 0 to 1.
            EngineError: images of another size or type than the network takes.
        """
        config, total = self.config, images.shape[self._axis(images)]
        logits = np.zeros((total, config.classes))
        steps = np.zeros(total, np.int64)
        gates = np.zeros((config.blocks, config.steps, total, config.tokens), np.uint8)
        places, events, out_of_range = [], [], dict[str, None]()
        for t, here, result, leaves in self._walk(images, margin, decay, "none", count_events=True):
            gone = here[leaves]
            logits[gone], steps[gone] = result.logits[leaves], t
            gates[:, :t, gone] = _gates(result)[:, :, leaves] if result.gates else 1
            assert result.events is not None  # counting is on
            places.append(gone)
            events.append(result.events.select(np.flatnonzero(leaves)))
            out_of_range.update((layer.node, None) for layer in result.out_of_range)
            if progress:
                progress(int(np.count_nonzero(steps)), total)
        counted = replace(join(events), steps=config.steps)
        in_order = counted.select(np.argsort(np.concatenate(places)))
        return ExitResult(logits, steps, gates, in_order, tuple(out_of_range))

    def verify(self, images: Images, margin: float, *, decay: float = 1.0) -> StageResult:
        """Compare each network with its quantised torch model, on the images still in at its step.

        Returns sums over the networks: a spike counts each time that it is compared, and so does an
        image whose logits differ; `images` are those given.

        Args:
            images, margin, decay: as for `run`.
        """
        found = []
        for t, here, ours, _ in self._walk(images, margin, decay, "spikes", count_events=False):
            model, graph = self._models[t - 1], self._engines[t - 1].graph
            theirs = model_trace(model, self._first_steps(images, t, here))
            result = compare(graph, theirs, ours.trace, names=(TORCH, ENGINE))
            first = result.first_difference
            if first is not None:
                first = replace(first, image=int(here[first.image]))
            found.append(replace(result, first_difference=first))
        return _summed(found, images.shape[self._axis(images)])

    def _walk(
        self, images: Images, margin: float, decay: float, record: Record, count_events: bool
    ) -> Iterator[tuple[int, npt.NDArray[np.int64], EngineResult, npt.NDArray[np.bool_]]]:
        """Step t, the images [R] still in, their run over t steps, and which of them leave, [R]."""
        self._check(images, margin, decay)
        here = np.arange(images.shape[self._axis(images)])
        for t, engine in enumerate(self._engines, start=1):
            last = t == self.config.steps
            if np.isinf(margin) and not last:
                continue  # nobody would leave
            part = self._first_steps(images, t, here)
            result = engine.run(part, record=record, count_events=count_events)
            leaves = (_margins(result.logits) >= margin * decay ** (t - 1)) | last
            yield t, here, result, leaves
            here = here[~leaves]
            if not len(here):
                return

    def _check(self, images: Images, margin: float, decay: float) -> None:
        if not margin > 0:
            raise ExitError(
                f"exit margin {margin:g}: it must be above 0, or every image would leave after one "
                "step; for that use a model of one step"
            )
        if not 0 < decay <= 1:
            raise ExitError(
                f"exit decay {decay:g}: the margin falls from step to step by a factor above 0 and "
                "at most 1"
            )
        if self._axis(images) and len(images) != self.config.steps:
            raise EngineError(
                f"events over {len(images)} time steps, but the model has {self.config.steps}: "
                "give [steps, images, ...]"
            )

    def _axis(self, images: Images) -> int:
        return image_axis(self._engines[0].graph, images)

    def _first_steps(self, images: Images, t: int, which: npt.NDArray[np.int64]) -> Images:
        chosen = select(images, self._axis(images), which)
        return chosen[:t] if self._axis(images) else chosen


def _margins(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Largest minus second largest of logits [B, classes], float64 [B]."""
    second, largest = np.partition(logits, -2, axis=1)[:, -2:].T
    return largest - second


def _gates(result: EngineResult) -> npt.NDArray[np.uint8]:
    return np.stack(list(result.gates.values()))


def _summed(parts: list[StageResult], images: int) -> StageResult:
    firsts = (part.first_difference for part in parts if part.first_difference is not None)
    return replace(
        parts[0],
        images=images,
        spikes_compared=sum(part.spikes_compared for part in parts),
        spikes_differing=sum(part.spikes_differing for part in parts),
        logits_differing=sum(part.logits_differing for part in parts),
        first_difference=next(firsts, None),
    )
