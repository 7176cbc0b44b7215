"""What a process model does in each phase, without the detours of Lava's command handlers.

Lava's handlers ask each model for its guards, for its ports' time and for its answer in every
phase. Most models define `run_spk` alone: for them every question has one answer, known before the
run. Their `run_spk` is called directly, and their other phases are marked, not scheduled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from lava.magma.core.model.py.model import AbstractPyProcessModel, PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyOutPort
from lava.proc.dense.models import AbstractPyDenseModelBitAcc, AbstractPyDenseModelFloat

Handler = Callable[[], None]
Layout = Callable[[npt.NDArray], npt.NDArray]

_PHASE, _RESPONSE = PyLoihiProcessModel.Phase, PyLoihiProcessModel.Response
_HANDLERS = {
    "_spike": _PHASE.SPK,
    "_pre_mgmt": _PHASE.PRE_MGMT,
    "_lrn": _PHASE.LRN,
    "_post_mgmt": _PHASE.POST_MGMT,
    "_host": _PHASE.HOST,
}
_SAME = (*_HANDLERS, "pre_guard", "lrn_guard", "post_guard", "advance_to_time_step")
_STATE = ("time_step", "phase", "_req_pause", "_req_stop")
_TAKE_COLUMNS = (AbstractPyDenseModelFloat.run_spk, AbstractPyDenseModelBitAcc.run_spk)


def is_plain(model: Any) -> bool:
    """The model has a spiking phase alone: Lava's own handlers, and guards that say nothing."""
    kind, own = type(model), vars(model)
    return (
        isinstance(model, PyLoihiProcessModel)
        and kind.__setattr__ is AbstractPyProcessModel.__setattr__
        and all(getattr(kind, name) is getattr(PyLoihiProcessModel, name) for name in _SAME)
        and own.keys().isdisjoint(_SAME)
        and not any(hasattr(kind, name) for name in _STATE)
        and all(model._cmd_handlers[p[0]] == getattr(model, n) for n, p in _HANDLERS.items())
        and not any(_tells_time(port) for port in model.py_ports)
    )


def plain_handlers(model: Any) -> dict[int, Handler]:
    """By phase, what a plain model does in it: the same as in Lava's own handlers."""
    found = {int(phase[0]): _marking(model, phase) for phase in _HANDLERS.values()}
    found[int(_PHASE.SPK[0])] = _spiking(model, _layout(model))
    return found


def takes_columns(model: Any) -> bool:
    """All that the model does with its weights is to add the columns of inputs that fired."""
    return _is_dense(model) and not model.var_ports and not np.any(model.num_message_bits)


def by_column(weights: npt.NDArray) -> npt.NDArray:
    """A matrix with each column in one piece in memory.

    What is taken out of it by column has the same layout as what is taken out of a matrix by row,
    so its sum is formed in the same order and is the same to the bit, in floating point too.
    """
    return np.asfortranarray(weights)


def _is_dense(model: Any) -> bool:
    return type(model).run_spk in _TAKE_COLUMNS and "run_spk" not in vars(model)


def _layout(model: Any) -> Layout | None:
    """How the weights are to lie in memory; by row, as Lava has them, for a multiplication."""
    if takes_columns(model):
        return by_column
    return np.ascontiguousarray if _is_dense(model) else None


def _spiking(model: Any, layout: Layout | None) -> Handler:
    state = vars(model)
    weights = None

    def spike() -> None:
        nonlocal weights
        state["time_step"] += 1
        state["phase"] = _PHASE.SPK
        if layout is not None and state["weights"] is not weights:
            state["weights"] = weights = layout(state["weights"])
        model.run_spk()
        if state["_req_pause"] or state["_req_stop"]:
            model._handle_pause_or_stop_req()

    return spike


def _marking(model: Any, phase: npt.NDArray) -> Handler:
    state, prepares = vars(model), phase is _PHASE.PRE_MGMT
    hosts = phase is _PHASE.HOST

    def mark() -> None:
        state["phase"] = phase
        if not hosts and (state["_req_pause"] or state["_req_stop"]):
            model._handle_pause_or_stop_req()
        elif prepares:
            model.process_to_service.send(_RESPONSE.REQ_LEARNING)

    return mark


def _tells_time(port: Any) -> bool:
    return isinstance(port, PyOutPort) and (
        type(port).advance_to_time_step is not PyOutPort.advance_to_time_step
        or any(hasattr(end, "advance_to_time_step") for end in port.csp_ports)
    )
