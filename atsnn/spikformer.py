"""Spikformer (Zhou et al., ICLR 2023, CIFAR variant) with halting and merging of tokens.

Shapes: T time steps, B images, N tokens, D channels; values are [T, B, N, D] throughout. Layers
run all time steps at once, since the default halting order never looks back; the orders that do
run step by step. In training a closed gate masks spikes; `forward_rows` leaves the rows out
instead, and both fire the same spikes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from atsnn.config import ModelConfig
from atsnn.errors import ConfigError, DatasetError
from atsnn.halting import LOOK_BACK_ORDERS, Gate, HaltingScore, ponder
from atsnn.layers import (
    AttentionCore,
    ConvLayer,
    Hold,
    Readout,
    SpikePool,
    StreamAdd,
    TimeFirst,
    TokenLayer,
    TokenNorm,
    ToTokens,
)
from atsnn.merging import TokenMerging
from atsnn.neurons import SpikingNeuron
from atsnn.rivals import TokenSelection, build_selection

State = dict[str, Any]

SCORE_OFF = -1e4
"""beta of a score that must not count: with it every score is exactly 0."""


@dataclass(frozen=True)
class ModelOutput:
    """What one forward pass returns.

    Attributes:
        logits: [B, classes].
        gates: [L, T, B, N], 1 where a block processed a token.
        ponder: [B, N], active cells plus remainder.
        scores: halting scores, 1 = certain, the stem's first: [L, T, B, N], the last block's score
            left out where no gate reads it; [L + 1, T, B, N] in orders that look back.
    """

    logits: Tensor
    gates: Tensor
    ponder: Tensor
    scores: Tensor

    @property
    def average_tokens(self) -> Tensor:
        """Mean over images of active cells / (L * T * N)."""
        return self.gates.detach().mean()


class Stem(nn.Module):
    """Spiking patch splitting: four convolutions, two pools, and a position branch.

    With `config.stem_once` it runs one step only and its spikes serve all steps (after STAS's idea,
    arXiv 2508.14138, which merges the spikes of several steps; reconstruction).

    Attributes:
        frozen: what training calls instead of `front`, see `atsnn.frozen_stem`; None: `front`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = [config.dim // 8, config.dim // 4, config.dim // 2, config.dim]
        self.steps = 1 if config.stem_once else config.steps
        self.time_first = TimeFirst() if config.events else None
        self.conv1 = _conv_layer(config, config.in_channels, widths[0])
        self.conv2 = _conv_layer(config, widths[0], widths[1])
        self.conv3 = _conv_layer(config, widths[1], widths[2])
        self.pool3 = SpikePool()
        self.conv4 = _conv_layer(config, widths[2], widths[3])
        self.pool4 = SpikePool()
        self.position = _conv_layer(config, widths[3], widths[3])
        self.to_tokens = ToTokens()
        self.position_to_tokens = ToTokens()
        self.add = StreamAdd(joins=2)
        self.hold = Hold(config.steps) if config.stem_once else None
        self.frozen: Callable[[Tensor], Tensor] | None = None

    def front(self, image: Tensor) -> Tensor:
        """Image [B, C, H, W], or events [B, T, C, H, W] -> spikes [T, B, D, h, w]."""
        if self.time_first is None:
            x = self.conv1(image.unsqueeze(0), self.steps)
        else:
            x = self.conv1(self.time_first(image))
        x = self.pool3(self.conv3(self.conv2(x)))
        return self.pool4(self.conv4(x))

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, C, H, W], or events [B, T, C, H, W] -> tokens [T, B, N, D]."""
        front = self.frozen if self.training and self.frozen is not None else self.front
        x = front(image)
        tokens = self.add(self.to_tokens(x), self.position_to_tokens(self.position(x)))
        return tokens if self.hold is None else self.hold(tokens)


class EncoderBlock(nn.Module):
    """Spiking self-attention, merging, MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        dim, hidden = config.dim, config.dim * config.mlp_ratio
        self.q = _token_layer(config, dim, dim)
        self.k = _token_layer(config, dim, dim)
        self.v = _token_layer(config, dim, dim)
        self.attention = AttentionCore(config.heads, config.attention_scale)
        self.attention_neuron = SpikingNeuron(config.tau, config.attention_threshold)
        self.proj = _token_layer(config, dim, dim)
        self.add_attention = StreamAdd()
        self.merging = _merging(config) if config.merges_at(index) else None
        self.fc1 = _token_layer(config, dim, hidden)
        self.fc2 = _token_layer(config, hidden, dim)
        self.add_mlp = StreamAdd()

    def forward(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        alive: Tensor | None = None,
        size: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Masked form. x [T, B, N, D], gate [T, B, N]; returns stream, alive and size.

        `state` carries membrane potentials and the merging assignment between chunks of steps.
        """
        state = {} if state is None else state
        q, state["q"] = self.q(x, gate, state.get("q"))
        k, state["k"] = self.k(x, gate, state.get("k"))
        v, state["v"] = self.v(x, gate, state.get("v"))
        mixed = self.attention(q, k, v)
        y, state["attention"] = self.attention_neuron(mixed, gate, state.get("attention"))
        y, state["proj"] = self.proj(y, gate, state.get("proj"))
        x = self.add_attention(y, x)
        if self.merging is not None:
            x, gate, alive, size, state["pairs"] = self.merging(
                x, gate, alive, size, k, state.get("pairs")
            )
        y, state["fc1"] = self.fc1(x, gate, state.get("fc1"))
        y, state["fc2"] = self.fc2(y, gate, state.get("fc2"))
        return self.add_mlp(y, x), alive, size

    def forward_rows(
        self,
        x: Tensor,
        gate: Tensor,
        alive: Tensor | None,
        size: Tensor | None,
        state: State,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same function with the rows of halted tokens left out of every layer."""
        opened = gate > 0
        rows = x[opened]
        q, state["q"] = self.q.forward_rows(rows, opened, state.get("q"))
        k, state["k"] = self.k.forward_rows(rows, opened, state.get("k"))
        v, state["v"] = self.v.forward_rows(rows, opened, state.get("v"))
        keys = scatter_rows(k, opened)
        mixed = self.attention(scatter_rows(q, opened), keys, scatter_rows(v, opened))[opened]
        y, state["attention"] = self.attention_neuron.forward_rows(
            mixed, opened, state.get("attention")
        )
        y, state["proj"] = self.proj.forward_rows(y, opened, state.get("proj"))
        x = self.add_attention(scatter_rows(y, opened), x)
        if self.merging is not None:
            x, gate, alive, size, state["pairs"] = self.merging(
                x, gate, alive, size, keys, state.get("pairs")
            )
            opened = gate > 0
        y, state["fc1"] = self.fc1.forward_rows(x[opened], opened, state.get("fc1"))
        y, state["fc2"] = self.fc2.forward_rows(y, opened, state.get("fc2"))
        return self.add_mlp(scatter_rows(y, opened), x), alive, size


class StemMerging(nn.Module):
    """Merging of the stem's tokens, in front of the first gate; its own gate is always open."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.score = HaltingScore(1.0, SCORE_OFF, learn=False)
        self.gate = Gate(1.0 - config.halting.epsilon, 1.0, accumulate=False)
        self.merging = _merging(config)

    def forward(
        self, x: Tensor, state: State | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [T, B, N, D]; returns stream, alive and size. `state` as in `EncoderBlock`."""
        state = {} if state is None else state
        gate, _ = self.gate(self.score(x))
        x, _, alive, size, state["pairs"] = self.merging(
            x, gate.detach(), None, None, None, state.get("pairs")
        )
        return x, alive, size


def scatter_rows(rows: Tensor, opened: Tensor) -> Tensor:
    """Rows [R, D] back to [T, B, N, D], zero where `opened` is false."""
    full = rows.new_zeros((*opened.shape, rows.shape[-1]))
    full[opened] = rows
    return full


@dataclass
class _Decisions:
    """What has been decided about tokens on the way through the blocks, all [T, B, N]."""

    gates: list[Tensor] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    score: Tensor | None = None


class Spikformer(nn.Module):
    """A spiking vision transformer whose tokens halt and merge."""

    quantized = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.stem = Stem(config)
        self.stem_merging = StemMerging(config) if config.merges_stem else None
        self.blocks = nn.ModuleList(EncoderBlock(config, i) for i in range(config.blocks))
        self.adaptive = config.halting.enabled or config.merging.enabled
        if self.adaptive:
            count = config.blocks + (config.halting.order in LOOK_BACK_ORDERS)
            self.scores = nn.ModuleList(_score(config, index) for index in range(count))
            self.gates = nn.ModuleList(
                Gate(1.0 - config.halting.epsilon, 1.0, config.halting.order != "blocks")
                for _ in range(config.blocks)
            )
        self.selects = config.selection.enabled
        if self.selects:
            self.selections = nn.ModuleList(
                build_selection(config, index) for index in range(config.blocks)
            )
        self.readout = Readout(config.dim, config.classes)
        self.apply(_initialize)

    @property
    def block_list(self) -> Sequence[EncoderBlock]:
        """The encoder blocks, typed."""
        return cast("Sequence[EncoderBlock]", self.blocks)

    @property
    def score_list(self) -> Sequence[HaltingScore]:
        """The halting scores, the stem's first, typed; empty without adaptation."""
        return cast("Sequence[HaltingScore]", self.scores) if self.adaptive else ()

    @property
    def gate_list(self) -> Sequence[Gate]:
        """The gates of the blocks, typed; empty without adaptation."""
        return cast("Sequence[Gate]", self.gates) if self.adaptive else ()

    @property
    def selection_list(self) -> Sequence[TokenSelection]:
        """The selections of a rival method, typed; empty without one."""
        return cast("Sequence[TokenSelection]", self.selections) if self.selects else ()

    def forward(self, image: Tensor) -> ModelOutput:
        """Masked form. Image [B, C, H, W] in [0, 1], or events [B, T, C, H, W] of 0 and 1."""
        _check_image(self.config, image)
        if self.adaptive and self.config.halting.order in LOOK_BACK_ORDERS:
            return self._by_steps(image, rows=False)
        logits, gates, totals, scores = self.forward_layers(image)
        return self._output(logits, gates, totals, scores, image)

    @torch.no_grad()
    def forward_rows(self, image: Tensor) -> ModelOutput:
        """The same function in inference, halted tokens left out of the computation."""
        _check_image(self.config, image)
        if not self.adaptive and not self.selects:
            return self.forward(image)
        if self.config.halting.order in LOOK_BACK_ORDERS:
            return self._by_steps(image, rows=True)
        return self._output(*self._layers_by_rows(image), image)

    def forward_layers(
        self, image: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Layer after layer, all steps at once: logits; per block gate, accumulator and score."""
        x, alive, size = self._enter(self.stem(image))
        seen = _Decisions()
        for index, block in enumerate(self.block_list):
            gate = self._gate(index, x, alive, seen)
            x, alive, size = block(x, gate, alive, size)
        return self._read_out(x, size), seen.gates, seen.totals, seen.scores

    def _layers_by_rows(self, image: Tensor):
        x, alive, size = self._enter(self.stem(image))
        seen = _Decisions()
        for index, block in enumerate(self.block_list):
            gate = self._gate(index, x, alive, seen)
            assert gate is not None  # the model leaves tokens out, or it would not run by rows
            x, alive, size = block.forward_rows(x, gate, alive, size, {})
        return self._read_out(x, size), seen.gates, seen.totals, seen.scores

    def _enter(
        self, x: Tensor, state: State | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Stream, alive and size as they reach the first block."""
        return (x, None, None) if self.stem_merging is None else self.stem_merging(x, state)

    def _gate(self, index: int, x: Tensor, alive: Tensor | None, seen: _Decisions) -> Tensor | None:
        """Gate of block `index`, noted in `seen`; None where every token is processed."""
        if self.selects:
            before = seen.gates[-1] if seen.gates else None
            seen.gates.append(self.selection_list[index](x, before))
        elif self.adaptive:
            score = self._score_of(index, x)
            seen.scores.append(score)
            seen.score = score if seen.score is None else seen.score + score
            gate, total = self.gate_list[index](seen.score, alive)
            seen.gates.append(gate)
            seen.totals.append(total)
        return seen.gates[-1] if seen.gates else None

    def _score_of(self, index: int, x: Tensor) -> Tensor:
        """Score of what leaves block `index`, the stem's first; one that is fixed passes no
        gradient, so that training may leave closed tokens out.
        """
        score = self.score_list[index](x)
        return score if _learns(self.config, index) else score.detach()

    def _read_out(self, x: Tensor, size: Tensor | None) -> Tensor:
        return self.readout(x, size if self.config.merging.readout == "size" else None)

    def _by_steps(self, image: Tensor, rows: bool) -> ModelOutput:
        """Step after step, for the orders whose gates look back."""
        stream = self.stem(image)
        states: list[State] = [{} for _ in self.blocks]
        entering: State = {}
        history: list[list[Tensor]] = []
        cells = []
        size = None
        for t in range(self.config.steps):
            x, alive, size = self._enter(stream[t : t + 1], entering)
            step_scores = [self._score_of(0, x)]
            gates, totals = [], []
            for index, block in enumerate(self.block_list):
                score = self._visible_score(index, step_scores, history)
                gate, total = self.gate_list[index](score, alive)
                run = block.forward_rows if rows else block
                x, alive, size = run(x, gate, alive, size, states[index])
                step_scores.append(self._score_of(index + 1, x))
                gates.append(gate)
                totals.append(total)
            history.append(step_scores)
            cells.append((x, gates, totals, step_scores))
        x = torch.cat([cell[0] for cell in cells])
        gates, totals, scores = (
            [torch.cat(values) for values in zip(*(cell[i] for cell in cells), strict=True)]
            for i in (1, 2, 3)
        )
        return self._output(self._read_out(x, size), gates, totals, scores, image)

    def _visible_score(self, index: int, now: list[Tensor], history: list[list[Tensor]]) -> Tensor:
        """Accumulated score [1, B, N] that gate `index` sees at this step."""
        order = self.config.halting.order
        zero = torch.zeros_like(now[0])
        if order == "steps":
            return sum((past[-1] for past in history), zero)
        past_end = {"rectangle": index + 2, "raster": len(self.blocks) + 1}[order]
        earlier = sum((sum(past[:past_end], zero) for past in history), zero)
        return earlier + sum(now[: index + 1], zero)

    def _output(self, logits, gates, totals, scores, image: Tensor) -> ModelOutput:
        config = self.config
        if not totals:
            cells = (config.blocks, config.steps, len(image), config.tokens)
            stacked = torch.stack(gates) if gates else logits.new_ones(cells)
            return ModelOutput(
                logits, stacked, stacked.sum((0, 1)), logits.new_zeros((1, *cells[1:]))
            )
        stacked = torch.stack(gates)
        unit = self.gate_list[0].unit
        cost = ponder(stacked, torch.stack(totals), unit)
        return ModelOutput(logits, stacked, cost, torch.stack(scores) / unit)


def build_model(config: ModelConfig, quantized: bool = False) -> Spikformer:
    """A freshly initialised model; `quantized`: with the structure of quantised checkpoints."""
    from atsnn.quantization import quantize_model

    model = Spikformer(config)
    return quantize_model(model) if quantized else model


def _conv_layer(config: ModelConfig, inputs: int, outputs: int) -> ConvLayer:
    synapse = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return ConvLayer(
        synapse, nn.BatchNorm2d(outputs), SpikingNeuron(config.tau, config.v_threshold)
    )


def _token_layer(config: ModelConfig, inputs: int, outputs: int) -> TokenLayer:
    return TokenLayer(
        nn.Linear(inputs, outputs),
        TokenNorm(outputs),
        SpikingNeuron(config.tau, config.v_threshold),
    )


def _merging(config: ModelConfig) -> TokenMerging:
    m = config.merging
    return TokenMerging(m.count, m.minimum_similarity, m.combine, m.similarity, m.assignment)


def _score(config: ModelConfig, index: int) -> HaltingScore:
    halting = config.halting
    if not score_counts(config, index):
        return HaltingScore(1.0, SCORE_OFF, learn=False)
    if index == 0 and halting.stem_beta is not None:
        return HaltingScore(halting.gamma, halting.stem_beta, halting.learn)
    return HaltingScore(halting.gamma, halting.beta, halting.learn)


def score_counts(config: ModelConfig, index: int) -> bool:
    """Whether a halting score counts, the stem's being the first."""
    halting = config.halting
    return halting.enabled and (halting.stem_score if index == 0 else halting.block_scores)


def _learns(config: ModelConfig, index: int) -> bool:
    return score_counts(config, index) and (index > 0 or config.halting.detected is None)


def _check(config: ModelConfig) -> None:
    if config.halting.order in LOOK_BACK_ORDERS and config.merging.assignment == "all":
        raise ConfigError(
            f"halting.order {config.halting.order} runs step by step, merging.assignment all needs "
            "every step at once; use assignment first or order upstream"
        )


def _check_image(config: ModelConfig, image: Tensor) -> None:
    frame = (config.in_channels, *config.image_size)
    expected = (config.steps, *frame) if config.events else frame
    if tuple(image.shape[1:]) != expected:
        raise DatasetError(
            f"image of shape {list(image.shape[1:])}, the model takes {list(expected)} "
            f"({'time steps, ' * config.events}channels, height, width); resize the images or "
            "choose another model"
        )


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
