"""The network for the first t of T time steps: what an image passes that leaves after step t.

A network that is causal in time fires the same spikes in its first t steps, however many follow.
The one for t steps is therefore the same weights with `steps` = t; only its read-out averages over
fewer, and the integer bias of a quantised one is rounded for that scale.
"""

from __future__ import annotations

from atsnn.config import ModelConfig
from atsnn.errors import ExitError
from atsnn.spikformer import Spikformer, build_model


def first_steps(model: Spikformer, steps: int) -> Spikformer:
    """The model, float or quantised, of the first steps of `model`; events are then so many frames.

    Raises:
        ExitError: see `check_causal`, or `model` has fewer steps.
    """
    check_causal(model.config)
    if not 1 <= steps <= model.config.steps:
        raise ExitError(
            f"the first {steps} time steps of a model of {model.config.steps}: give 1 to "
            f"{model.config.steps}"
        )
    prefix = build_model(model.config.model_copy(update={"steps": steps}), model.quantized)
    prefix.load_state_dict(model.state_dict())
    return prefix.to(next(model.parameters()).device).train(model.training)


def check_causal(config: ModelConfig) -> None:
    """Check that no step of a model depends on later ones.

    Raises:
        ExitError: it does; names the setting and what to use instead.
    """
    if config.selection.enabled:
        raise ExitError(
            f"selection.method {config.selection.method} chooses tokens once for all time steps, "
            "which an exit does not wait for; use halting or merging in its place"
        )
    if config.merging.enabled and config.merging.assignment == "all":
        raise ExitError(
            "merging.assignment all chooses pairs from all time steps, which an exit does not wait "
            "for; use assignment first"
        )
