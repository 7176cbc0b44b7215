"""A child interpreter in a session of its own: who belongs to it, and how to leave nothing behind.

Linux only: membership is read from `/proc`, shared memory from the maps of the members.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SHARED_MEMORY = re.compile(r"/dev/shm/[^\s/]+")


@dataclass(frozen=True)
class Member:
    """One process of a session.

    Attributes:
        state: one letter, Z for a process that has ended and was not yet waited for.
        exit_code: as `os.waitpid` gives it; meaningful in state Z only.
    """

    pid: int
    state: str
    exit_code: int

    @property
    def ended(self) -> bool:
        return self.state in "ZX"

    @property
    def ending(self) -> str:
        """How an ended process ended, in words."""
        number = os.WTERMSIG(self.exit_code)
        if os.WIFSIGNALED(self.exit_code):
            return f"was killed by {signal.Signals(number).name}"
        return f"ended with exit code {os.waitstatus_to_exitcode(self.exit_code)}"


def members(session: int) -> dict[int, Member]:
    """All processes of a session, by pid."""
    return {member.pid: member for member in _scan(session)}


def _scan(session: int) -> Iterator[Member]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if int(after_name[3]) == session:
            yield Member(int(folder.name), after_name[0], int(after_name[-1]))


def shared_memory(session: int) -> set[Path]:
    """Shared-memory segments that processes of a session have mapped or open."""
    found: set[Path] = set()
    for pid in members(session):
        with suppress(OSError):
            places = [Path(f"/proc/{pid}/maps").read_text()]
            places += [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
            found.update(Path(name) for place in places for name in _SHARED_MEMORY.findall(place))
    return found


def end_session(session: int) -> None:
    """Kill everything in a session but this process, and remove its shared memory.

    All members are stopped first, so that none makes a new segment after the look at the old ones.
    """
    _signal(session, signal.SIGSTOP)
    segments = shared_memory(session)
    while _signal(session, signal.SIGKILL):
        time.sleep(0.01)
    for segment in segments:
        segment.unlink(missing_ok=True)


def _signal(session: int, number: int) -> int:
    """Send a signal to all living members but this process; returns how many there were."""
    living = [m.pid for m in members(session).values() if not m.ended and m.pid != os.getpid()]
    for pid in living:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(living)
