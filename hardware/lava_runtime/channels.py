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
from lava.magma.core.model.py.ports import IdentityTransformer, PyInPortVectorDense
from lava.utils.sparse import find
from scipy.sparse import csr_matrix

if TYPE_CHECKING:
    from hardware.lava_runtime.tasks import Task

OUTSIDE = "outside"


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
        values = find(data, explicit_zeros=True)[2] if isinstance(data, csr_matrix) else data
        message = np.empty(channel.shape, channel.dtype)
        message[...] = values
        while len(channel.queue) >= channel.size:
            self._scheduler.wait(self)
        channel.queue.append(message)
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
        while not channel.queue:
            self._scheduler.wait(self)
        message = channel.queue.popleft()
        if channel.writer is not None:
            writer, channel.writer = channel.writer, None
            self._scheduler.wake(writer)
        return message


def shorten(port: Any) -> None:
    """Let an in-port with one source and no transformation hand on messages as they are.

    Lava adds every message to a new array of zeros. With one source that changes at most the type,
    and -0.0 to 0.0, which is kept.
    """
    if type(port) is not PyInPortVectorDense or len(port.csp_ports) != 1:
        return
    end: Any = port.csp_ports[0]
    if type(port._transformer) is not IdentityTransformer or end.shape != tuple(port._shape):
        return
    dtype = np.result_type(np.dtype(port._d_type), end.d_type)
    plain = dtype == end.d_type and dtype.kind in "iub"
    vars(port)["recv"] = end.recv if plain else lambda: np.add(end.recv(), 0, dtype=dtype)


@dataclass
class QueueLength:
    """What Lava's Injector and Extractor ask a port for: `port._queue.qsize()`."""

    port: RecvPort

    def qsize(self) -> int:
        """Number of messages."""
        self.port._scheduler.look(self.port)
        return len(self.port.channel.queue)
