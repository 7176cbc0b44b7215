"""Takes back what Lava hangs on global objects for each process and never removes.

Lava 0.10.0 keeps every process and every variable it has ever made in two global lists, adds a
console handler to the *root* logger for each process, and one to the compiler's logger for each
compilation. With them go the network's weights, and every message comes as often as there were
processes; a later `logging.basicConfig` by the user does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lava.magma.core.process.process import ProcessServer
from lava.magma.core.process.variable import VarServer
from lava.proc.io.injector import PyLoihiInjectorModel, PyLoihiInjectorModelAsync

COMPILER_LOGGER = "lava.magma.compiler.compiler"


@contextmanager
def compilation() -> Iterator[list[Any]]:
    """While Lava compiles: yields a list, which then holds the sub-processes made meanwhile."""
    logger = logging.getLogger(COMPILER_LOGGER)
    handlers, known = list(logger.handlers), set(map(id, ProcessServer().processes))
    made: list[Any] = []
    try:
        yield made
    finally:
        for handler in [h for h in logger.handlers if h not in handlers]:
            logger.removeHandler(handler)
        made += [p for p in ProcessServer().processes if id(p) not in known]


def relatives(leaves: Iterable[Any]) -> list[Any]:
    """Leaf processes, what contains them, and whatever else that contains."""
    found: dict[int, Any] = {}
    stack = list(leaves)
    while stack:
        process = stack.pop()
        if process is not None and id(process) not in found:
            found[id(process)] = process
            stack += [process.parent_proc, *process.procs.members]
    return list(found.values())


def forget(processes: Iterable[Any]) -> None:
    """Remove processes, their variables and their console handlers from Lava's global lists.

    Only a handler that looks exactly like the one that Lava adds for the process is removed, and
    one for each process. A process that was forgotten before is left out.
    """
    server, variables = ProcessServer(), VarServer()
    registered = set(map(id, server.processes))
    leaving = {id(p): p for p in processes if id(p) in registered}
    if not leaving:
        return
    server.processes = [p for p in server.processes if id(p) not in leaving]
    variables.vars = [v for v in variables.vars if id(v._process) not in leaving]
    for process in leaving.values():
        _remove_console_handler(process._log_config)


def mend(model: Any) -> None:
    """Give an Injector's model what its `__del__` joins and Lava never sets."""
    if isinstance(model, PyLoihiInjectorModel | PyLoihiInjectorModelAsync):
        model._p_to_pm_dst_port = model.in_port  # pyright: ignore[reportAttributeAccessIssue]


def untie(model: Any) -> None:
    """Cut what makes a process model refer to itself, so that its arrays go with the last use."""
    model._cmd_handlers, model._channel_actions = {}, []
    model.service_to_process = model.process_to_service = None
    for port in model.py_ports:
        port._process_model = None
        vars(port).pop("recv", None)
        vars(port).pop("send", None)


def _remove_console_handler(config: Any) -> None:
    root = logging.getLogger()
    for handler in reversed(root.handlers):
        formatter = handler.formatter
        if (
            type(handler) is logging.StreamHandler
            and handler.level == config.level_console
            and formatter is not None
            and formatter._fmt == config.format
            and formatter.datefmt == config.date_format
        ):
            root.removeHandler(handler)
            return
