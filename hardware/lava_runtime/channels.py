"""Channels between process models in one interpreter: a bounded queue with two ends.

The ends take the place of Lava's `CspSendPort` and `CspRecvPort` and inherit from them, since
Lava's builders and models tell ports apart by class. No shared memory, no semaphore, no thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from lava.magma.compiler.channels.pypychannel import CspRecvPort, CspSendPort
from lava.magma.core.model.py.ports import (
    IdentityTransformer,
    PyInPortVectorDense,
    PyOutPortVectorDense,
)
from lava.utils.sparse import find
from scipy.sparse import csr_matrix

if TYPE_CHECKING:
    from hardware.lava_runtime.tasks import Task

OUTSIDE = "outside"
_WHOLE = "biu"  # kinds of types without a negative zero


@dataclass(frozen=True)
class End:
    """One end of a channel, for messages: name of the process and of its port."""

    process: str
    port: str

    def __str__(self) -> str:
        return f"{self.process}.{self.port}" if self.port else self.process


class Waits(Protocol):
    """What a port needs of the scheduler."""

    def wait(self, port: SendPort | RecvPort) -> None:
        """Let others go on until the port may be ready; come back then."""
        ...

    def wake(self, task: Task) -> None:
        """A task that waits at a port may go on."""
        ...

    def request(self, channel: Channel) -> None:
        """A message has arrived at a VarPort."""
        ...

    def look(self, port: SendPort | RecvPort) -> None:
        """Asked from outside whether a port is ready: let the network run until it is."""
        ...


@dataclass(eq=False)
class Channel:
    """A queue of at most `size` messages, each an array of `shape` and `dtype`.

    Attributes:
        source, target: the two ends.
        reader, writer: the task that waits for a message, or for room.
        server: for a channel to a VarPort, its owner and the port.
        taken: the type in which the receiver takes the messages, without negative zeros; None if
            it takes them as they are.
    """

    source: End
    target: End
    shape: tuple[int, ...]
    dtype: np.dtype
    size: int
    queue: deque[npt.NDArray] = field(default_factory=deque)
    reader: Task | None = None
    writer: Task | None = None
    server: tuple[Task, Any] | None = None
    taken: np.dtype | None = None

    def message(self, data: Any) -> npt.NDArray:
        """What the receiver gets for data of the channel's shape: a copy, cast as Lava casts."""
        if type(data) is not np.ndarray:
            data = self._dense(data)
        message = data.astype(self.dtype, "C")
        return message if self.taken is None else self._as_taken(message, data.dtype.kind)

    def _as_taken(self, message: npt.NDArray, kind: str) -> npt.NDArray:
        taken = self.taken
        if taken is not self.dtype:
            message = message.astype(taken)
        if kind not in _WHOLE and message.dtype.kind not in _WHOLE:
            message += 0  # takes the sign off a negative zero
        return message

    def _dense(self, data: Any) -> npt.NDArray:
        values = find(data, explicit_zeros=True)[2] if isinstance(data, csr_matrix) else data
        result = np.empty(self.shape, self.dtype)
        result[...] = values
        return result


class SendPort(CspSendPort):
    """The sending end. Messages are copied and cast to the channel's type, as Lava casts them.

    Attributes:
        outside: it is the caller's end, not a process model's.
    """

    def __init__(self, channel: Channel, scheduler: Waits) -> None:
        # Not super().__init__(): it wants shared memory and semaphores.
        self._name, self._size = channel.source.port, channel.size
        self._shape, self._dtype = channel.shape, channel.dtype
        self.observer = None
        self.channel, self._scheduler = channel, scheduler
        self.outside = channel.source.process == OUTSIDE

    def start(self) -> None:
        """Nothing to start."""

    def join(self) -> None:
        """Nothing to end."""

    def probe(self) -> bool:
        """True if there is room for a message."""
        return len(self.channel.queue) < self.channel.size

    def send(self, data: Any) -> None:
        """Put a message into the channel; waits while the channel is full.

        Raises:
            ValueError: the message does not have the channel's shape.
        """
        channel = self.channel
        if data.shape != channel.shape:
            raise ValueError(
                f"a message of shape {data.shape} sent to {channel.target}, "
                f"which takes {channel.shape}"
            )
        message, queue = channel.message(data), channel.queue
        while len(queue) >= channel.size:
            self._scheduler.wait(self)
        queue.append(message)
        if channel.reader is not None:
            reader, channel.reader = channel.reader, None
            self._scheduler.wake(reader)
        elif channel.server is not None:
            self._scheduler.request(channel)


class RecvPort(CspRecvPort):
    """The receiving end. Attributes as in `SendPort`."""

    def __init__(self, channel: Channel, scheduler: Waits) -> None:
        self._name, self._size = channel.target.port, channel.size
        self._shape, self._dtype = channel.shape, channel.dtype
        self.observer = None
        self.channel, self._scheduler = channel, scheduler
        self.outside = channel.target.process == OUTSIDE
        self._queue = QueueLength(self)

    def start(self) -> None:
        """Nothing to start."""

    def join(self) -> None:
        """Nothing to end."""

    def probe(self) -> bool:
        """True if there is a message."""
        return bool(self.channel.queue)

    def peek(self) -> npt.NDArray:
        """The next message, which stays; waits for one."""
        while not self.channel.queue:
            self._scheduler.wait(self)
        return self.channel.queue[0].copy()

    def recv(self) -> npt.NDArray:
        """Take the next message; waits for one."""
        channel = self.channel
        queue = channel.queue
        while not queue:
            self._scheduler.wait(self)
        message = queue.popleft()
        if channel.writer is not None:
            writer, channel.writer = channel.writer, None
            self._scheduler.wake(writer)
        return message


def shorten(port: Any) -> None:
    """Let a port with one channel use it directly, where Lava's detour changes nothing.

    Lava's in-port adds every message to a new array of zeros. With one source that changes at most
    the type, and -0.0 to 0.0; both are done once, when the message is sent.
    """
    if len(port.csp_ports) != 1:
        return
    end: Any = port.csp_ports[0]
    if type(port) is PyOutPortVectorDense and isinstance(end, SendPort):
        vars(port)["send"] = end.send
    elif (
        type(port) is PyInPortVectorDense
        and type(port._transformer) is IdentityTransformer
        and end.shape == tuple(port._shape)
    ):
        end.channel.taken = taken_as(end.channel.dtype, np.dtype(port._d_type))
        vars(port)["recv"] = end.recv


def taken_as(sent: np.dtype, declared: np.dtype) -> np.dtype | None:
    """The type of the sum of zeros of the declared type and a message; None: the message's own."""
    dtype = np.result_type(declared, sent)
    if dtype != sent:
        return dtype
    return None if dtype.kind in _WHOLE else sent


@dataclass
class QueueLength:
    """What Lava's Injector and Extractor ask a port for: `port._queue.qsize()`."""

    port: RecvPort

    def qsize(self) -> int:
        """Number of messages."""
        self.port._scheduler.look(self.port)
        return len(self.port.channel.queue)
