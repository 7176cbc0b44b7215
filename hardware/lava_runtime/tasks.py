"""Tasks, the domains that give them their phases, and the scheduler that lets one run at a time.

A task is a process model and what it has to do. A worker, a greenlet, takes one task after another;
only when a task waits at a port does another worker go on in its place. One runs at a time and the
order follows from the network alone, so every run is the same.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy.typing as npt
from greenlet import GreenletExit, getcurrent, greenlet
from lava.magma.core.model.py.model import PyAsyncProcessModel, PyLoihiProcessModel
from lava.magma.runtime.mgmt_token_enums import MGMT_COMMAND, enum_to_np

from hardware.errors import LavaRuntimeError
from hardware.lava_runtime import handlers
from hardware.lava_runtime.channels import OUTSIDE, Channel, RecvPort, SendPort

_PHASE, _LOIHI = PyLoihiProcessModel.Phase, PyLoihiProcessModel.Response
SPIKING, PRE, LEARNING, POST, HOST = (
    int(phase[0])
    for phase in (_PHASE.SPK, _PHASE.PRE_MGMT, _PHASE.LRN, _PHASE.POST_MGMT, _PHASE.HOST)
)
PHASES = {
    SPIKING: "spiking phase",
    PRE: "pre-management phase",
    LEARNING: "learning phase",
    POST: "post-management phase",
    HOST: "host phase",
}
IDLE, ASYNCHRONOUS = "between runs", "asynchronous run"
_ASKS_FOR = {
    int(_LOIHI.REQ_PRE_LRN_MGMT[0]): PRE,
    int(_LOIHI.REQ_LEARNING[0]): LEARNING,
    int(_LOIHI.REQ_POST_LRN_MGMT[0]): POST,
}


@dataclass(eq=False)
class Task:
    """A process model and where it stands.

    Attributes:
        action: what it does next, or is doing.
        busy: it has not finished its action.
        waiting: the port at which it waits.
        worker: where it was left when it gave way to others.
        requests: VarPorts at which a message has arrived, in order of arrival.
        handlers: what it does in each phase.
        plain: it has a spiking phase alone (`handlers.is_plain`).
    """

    process: Any
    model: Any
    domain: LoihiDomain | AsyncDomain
    action: Callable[[], Any] | None = None
    busy: bool = False
    waiting: SendPort | RecvPort | None = None
    worker: greenlet | None = None
    requests: deque[Any] = field(default_factory=deque)
    handlers: Mapping[int, Callable[[], Any]] = field(default_factory=dict)
    plain: bool = False

    @property
    def name(self) -> str:
        return self.process.name

    @property
    def time_step(self) -> int:
        return int(getattr(self.model, "time_step", 0))

    def prepare(self) -> None:
        """Before a run: find out what it does in each phase."""
        self.plain = handlers.is_plain(self.model)
        plain = handlers.plain_handlers(self.model) if self.plain else None
        self.handlers = plain or self.model._cmd_handlers


class Service:
    """Takes the place of both ports between a process model and Lava's runtime service."""

    def __init__(self, task: Task, scheduler: Scheduler) -> None:
        self._task, self._scheduler = task, scheduler
        self.commands: deque[npt.NDArray] = deque()

    def start(self) -> None:
        """Nothing to start."""

    def join(self) -> None:
        """Nothing to end."""

    def send(self, message: npt.NDArray) -> None:
        """The model answers."""
        self._task.domain.answer(int(message[0]))

    def probe(self) -> bool:
        """An asynchronous model asks whether it is to stop: the others go on first."""
        self._scheduler.pass_turn()
        return bool(self.commands)

    def peek(self) -> npt.NDArray:
        """The next command, which stays."""
        return self.commands[0]

    def recv(self) -> npt.NDArray:
        """Take the next command."""
        return self.commands.popleft()


class Order:
    """The order in which tasks begin their spiking phase: one in which few have to wait.

    After a step in which tasks waited, these begin later, in the order in which they went on; the
    other way round if that is what they did. Once it has not helped for a few steps (in a circle,
    some task always waits), the best order stays.

    Attributes:
        tasks: in this order.
        delayed: those that waited in this step, in the order in which they went on.
    """

    PATIENCE = 4

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.delayed: list[Task] = []
        self._best: list[Task] = []
        self._fewest = sys.maxsize
        self._vain = 0

    def improve(self) -> None:
        """After a spiking phase."""
        if self.delayed and self._vain < self.PATIENCE:
            self._note_the_best()
            self.tasks = self._next() if self._vain < self.PATIENCE else self._best
        self.delayed.clear()

    def _note_the_best(self) -> None:
        if len(self.delayed) < self._fewest:
            self._fewest, self._best, self._vain = len(self.delayed), self.tasks, 0
        else:
            self._vain += 1

    def _next(self) -> list[Task]:
        late = list(dict.fromkeys(reversed(self.delayed)))[::-1]  # by the last time it waited
        waited = set(late)
        soon = [task for task in self.tasks if task not in waited]
        return soon + (late if soon + late != self.tasks else late[::-1])


class LoihiDomain:
    """Process models that step together, phase by phase, as Lava's LoihiPyRuntimeService orders it.

    Attributes:
        order: of the tasks.
        pending: tasks that have not finished the phase.
        phase: the current phase.
        pauses, stops: a model has asked for it.
        finished: the run is over.
    """

    def __init__(self) -> None:
        self.order = Order()
        self.pending = 0
        self.phase = HOST
        self.pauses = self.stops = False
        self.finished = True
        self._asked: set[int] = set()
        self._steps = 0

    @property
    def phase_name(self) -> str:
        return IDLE if self.finished else PHASES[self.phase]

    @property
    def serves(self) -> bool:
        """VarPorts are served in the management and host phases, after the owner's own part."""
        return self.phase in (PRE, POST, HOST)

    def begin(self, steps: int) -> None:
        """Start a run of a number of time steps."""
        for task in self.order.tasks:
            task.prepare()
        self._steps, self.finished, self.phase = steps, False, 0
        self.pauses = self.stops = False

    def pause(self) -> None:
        """End the run after the current time step."""
        self.pauses = True

    def answer(self, code: int) -> None:
        """What a model says at the end of a phase."""
        if code in _ASKS_FOR:
            self._asked.add(_ASKS_FOR[code])
        elif code == int(_LOIHI.REQ_PAUSE[0]):
            self.pauses = True
        elif code == int(_LOIHI.REQ_STOP[0]):
            self.stops = True

    def next_tasks(self) -> list[Task]:
        """Those with an action in the next phase, which may be none."""
        if self.phase == SPIKING:
            self.order.improve()
        asked = next((phase for phase in (PRE, LEARNING, POST) if phase in self._asked), None)
        if asked is not None:
            self._asked.remove(asked)
            self.phase = asked
        elif self.pauses or self.stops or (not self._steps and self.phase == HOST):
            self.finished = True
            return []
        elif self._steps:
            self._steps -= 1
            self.phase = SPIKING
        else:
            self.phase = HOST
        return self._with_action()

    def _with_action(self) -> list[Task]:
        phase, tasks = self.phase, self.order.tasks
        if phase != SPIKING:
            for task in tasks:
                if task.plain:
                    task.handlers[phase]()
            tasks = [task for task in tasks if not task.plain]
        for task in tasks:
            task.action = task.handlers[phase]
        return tasks


class AsyncDomain:
    """Process models that run freely (PyAsyncProcessModel). Attributes as in `LoihiDomain`."""

    serves = False
    phase_name = ASYNCHRONOUS

    def __init__(self) -> None:
        self.order = Order()
        self.pending = 0
        self.pauses = self.stops = False
        self.finished = True
        self._steps: int | None = None

    def begin(self, steps: int) -> None:
        """Start a run; the models are told the number of steps."""
        self._steps, self.finished = steps, False
        self.pauses = self.stops = False

    def pause(self) -> None:
        """Tell the models that poll for it."""
        for task in self.order.tasks:
            task.model.service_to_process.commands.append(MGMT_COMMAND.PAUSE)

    def answer(self, code: int) -> None:
        """What a model says when it returns."""
        response = PyAsyncProcessModel.Response
        self.pauses |= code == int(response.REQ_PAUSE[0])
        self.stops |= code == int(response.REQ_STOP[0])

    def next_tasks(self) -> list[Task]:
        """All of them, once."""
        if self._steps is None:
            self.finished = True
            return []
        steps, self._steps = enum_to_np(self._steps), None
        for task in self.order.tasks:
            task.model.service_to_process.commands = deque([steps])
            task.action = task.model._cmd_handlers[MGMT_COMMAND.RUN[0]]
        return self.order.tasks


Domain = LoihiDomain | AsyncDomain


class Scheduler:
    """Lets one task run at a time; a task that waits at a port gives way to the others.

    Args:
        fail: ends everything after a task, or what lies between tasks, has failed; gives the error
            to raise.
    """

    def __init__(self, fail: Callable[[Task | None, BaseException], BaseException]) -> None:
        self._fail = fail
        self.tasks: list[Task] = []
        self.domains: list[Domain] = []
        self.current: Task | None = None
        self._ready: deque[Task] = deque()
        self._polling: deque[Task] = deque()
        self._requested: deque[Task] = deque()
        self._hub: Any = None
        self._until: Callable[[], bool] | None = None
        self._workers: list[greenlet] = []
        self._idle: list[greenlet] = []
        self._failure: BaseException | None = None
        self._thread = 0
        self._closing = False

    # --- seen from inside: ports and services -----------------------------------------------------

    def wait(self, port: SendPort | RecvPort) -> None:
        """See `channels.Waits`. From outside the network: let it run until the port is ready."""
        if port.outside:
            self.look(port)
            if not port.probe():
                raise LavaRuntimeError(self._nothing_comes(port))
            return
        if self._closing:
            raise GreenletExit
        task = self.current
        assert task is not None
        task.waiting = port
        if isinstance(port, RecvPort):
            port.channel.reader = task
        else:
            port.channel.writer = task
        self._give_way(task)
        task.domain.order.delayed.append(task)

    def wake(self, task: Task) -> None:
        """See `channels.Waits`."""
        self._ready.append(task)

    def request(self, channel: Channel) -> None:
        """See `channels.Waits`."""
        assert channel.server is not None
        owner, port = channel.server
        owner.requests.append(port)
        self._requested.append(owner)

    def look(self, port: SendPort | RecvPort) -> None:
        """See `channels.Waits`."""
        if port.outside and not port.probe():
            self.advance(port.probe)

    def pass_turn(self) -> None:
        """Let every other task go on first."""
        task = self.current
        if task is not None and not self._closing:
            self._polling.append(task)
            self._give_way(task)

    def _nothing_comes(self, port: SendPort | RecvPort) -> str:
        channel = port.channel
        if isinstance(port, RecvPort):
            return (
                f"nothing arrives from {channel.source}: the network is not running, or it waits "
                "itself"
            )
        return (
            f"no room in the channel to {channel.target}: {len(channel.queue)} messages lie there, "
            "and the network is not running, or it waits itself"
        )

    # --- seen from outside ------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """No domain has anything left to do."""
        return all(domain.finished for domain in self.domains)

    @property
    def waiting(self) -> list[Task]:
        """Tasks that wait at a port."""
        return [task for task in self.tasks if task.waiting is not None]

    def begin(self, steps: int) -> None:
        """Start a run."""
        self._thread = threading.get_ident()
        self._closing = False
        for domain in self.domains:
            domain.begin(steps)
        for task in self.tasks:
            self._requested.extend(task for _ in task.requests)

    def advance(self, until: Callable[[], bool] | None = None) -> None:
        """Let tasks run until `until()` holds, or until none can go on.

        Raises:
            LavaModelError: an action raised.
            LavaRuntimeError: another thread has started the run.
        """
        if self.current is not None or self._is_anothers():
            raise LavaRuntimeError(
                "the network runs in another thread; send to it, receive from it and wait for it "
                "in the thread that started the run"
            )
        self._hub, self._until = getcurrent(), until
        try:
            self._go_on_elsewhere()
        finally:
            task, self.current = self.current, None
            error, self._failure = self._failure, None
            self._hub = self._until = None
        if error is not None:
            raise self._fail(task, error)

    def _is_anothers(self) -> bool:
        return self._thread != threading.get_ident() and not self.finished

    def end(self) -> None:
        """End every worker, whatever it is doing."""
        self._closing = True
        for worker in self._workers:
            if not worker.dead:
                worker.parent = getcurrent()
                worker.throw(GreenletExit)
        for task in self.tasks:
            task.action, task.busy, task.waiting, task.worker = None, False, None, None
        for queue in (self._ready, self._polling, self._requested, self._workers, self._idle):
            queue.clear()

    # --- workers ----------------------------------------------------------------------------------

    def _give_way(self, task: Task) -> None:
        """Leave the task here and let others go on; comes back when it is its turn."""
        task.worker = getcurrent()
        self._go_on_elsewhere()
        self.current, task.worker, task.waiting = task, None, None

    def _go_on_elsewhere(self) -> None:
        """Let an idle worker take the next tasks, or a new one."""
        if not self._idle:
            self._workers.append(greenlet(self._work, self._hub))
            self._idle.append(self._workers[-1])
        self._idle.pop().switch()

    def _work(self) -> None:
        """What a worker does until it is ended."""
        while True:
            try:
                self._take_tasks()
            except GreenletExit:
                return
            except BaseException as error:  # also KeyboardInterrupt: the hub raises it again
                self._failure = error
            self._idle.append(getcurrent())
            self._hub.switch()

    def _take_tasks(self) -> None:
        """One after the other, until none can go on or the caller has what it waited for."""
        ready = self._ready
        while self._until is None or not self._until():
            task = ready.popleft() if ready else self._next()
            if task is None:
                return
            if task.worker is not None:
                self._idle.append(getcurrent())
                task.worker.switch()
                continue
            self.current = task
            assert task.action is not None
            task.action()
            if self._closing:
                raise GreenletExit
            task.busy, self.current = False, None
            task.domain.pending -= 1

    def _next(self) -> Task | None:
        while True:
            if self._ready:
                return self._ready.popleft()
            if self._serve() or self._go_on():
                continue
            return self._polling.popleft() if self._polling else None

    def _serve(self) -> bool:
        """Give one VarPort's request to its owner, if it is the time for it."""
        for _ in range(len(self._requested)):
            owner = self._requested.popleft()
            if not owner.requests:
                continue
            if not owner.busy and owner.domain.serves and not owner.domain.finished:
                port = owner.requests.popleft()
                owner.action, owner.busy = partial(owner.model._handle_var_port, port), True
                owner.domain.pending += 1
                self._ready.append(owner)
                return True
            self._requested.append(owner)
        return False

    def _go_on(self) -> bool:
        """Start the next phase of the domains that have finished theirs."""
        started = False
        for domain in self.domains:
            if not domain.finished and not domain.pending:
                tasks = domain.next_tasks()
                for task in tasks:
                    task.busy = True
                domain.pending = len(tasks)
                self._ready.extend(tasks)
                if domain.finished and (domain.pauses or domain.stops):
                    self.pause()
                started = True
        return started

    def pause(self) -> None:
        """End the run after the current time step."""
        for domain in self.domains:
            if not domain.finished:
                domain.pause()


def describe_waiting(tasks: Sequence[Task]) -> tuple[str, ...]:
    """A line for each task that waits: who, where and for whom."""
    return tuple(_describe(task) for task in tasks if task.waiting is not None)


def _describe(task: Task) -> str:
    port = task.waiting
    assert port is not None
    channel = port.channel
    if isinstance(port, SendPort):
        return (
            f"{task.name} waits at {port.name} for room: {len(channel.queue)} messages lie unread "
            f"at {channel.target}"
        )
    sender = "a message from outside" if channel.source.process == OUTSIDE else f"{channel.source}"
    return f"{task.name} waits at {port.name} for {sender}"
