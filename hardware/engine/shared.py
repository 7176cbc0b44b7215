"""What several nodes need of the same values, worked out once per batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hardware.engine.lists import EventLists, are_unrolled, list_events
from hardware.engine.plan import Interval
from hardware.engine.rows import Array, as_rows
from hardware.engine.tally import (
    PerImage,
    RowArray,
    RowCounts,
    Sent,
    count_closed,
    count_messages,
    count_rows,
    of_spikes,
    sent_rows,
    sum_over_time,
    sum_rows,
)


class Shared:
    """Counts and lists of a batch's values. An entry goes when its values go."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Any] = {}
        self._units: set[int] = {1}

    def __len__(self) -> int:
        return len(self._held)

    def counts(self, values: Array, unit: int) -> RowCounts:
        """Counts of each row of `values`, of which `unit` stands for one spike."""
        if values.dtype == np.bool_:
            return of_spikes(self.messages(values))
        self._units.add(unit)
        return self._once(("counts", unit, id(values)), values, lambda: _count(values, unit))

    def messages(self, values: Array) -> RowArray:
        """How many values of each row are not 0, int32 [S, B, R]."""
        for unit in self._units:
            known = self._held.get(("counts", unit, id(values)))
            if known is not None:
                return known.messages
        return self._once(("messages", id(values)), values, lambda: count_messages(as_rows(values)))

    def messages_over_time(self, values: Array) -> RowArray:
        """The same over all steps, int32 [B, R]."""

        def make() -> RowArray:
            return sum_over_time(self.messages(values))

        return self._once(("messages over time", id(values)), values, make)

    def closed(self, gate: npt.NDArray[np.bool_]) -> PerImage:
        """Closed tokens of a gate [S, B, N] over its steps, int64 [B]."""
        return self._once(("closed", id(gate)), gate, lambda: count_closed(gate))

    def total(self, values: Array) -> PerImage:
        """How many values are not 0, over all steps, int64 [B]."""
        return self._once(
            ("total", id(values)), values, lambda: sum_rows(self.messages(values), None)
        )

    def sent(self, values: Array, unit: int, gate: npt.NDArray[np.bool_] | None) -> Sent:
        """Counts of all open rows over time."""

        def make() -> tuple[Sent, npt.NDArray[np.bool_] | None]:
            # the gate is kept with them, so that no other gate can get its id
            return sent_rows(self.counts(values, unit), gate), gate

        return self._once(("sent", unit, id(gate), id(values)), values, make)[0]

    def same_rows(self, values: Array, others: Array) -> None:
        """What is known of the rows of `values` holds for `others`, which has the same."""
        for (what, *more, key), known in list(self._held.items()):
            if key == id(values) and what in ("counts", "messages"):
                self._once((what, *more, id(others)), others, lambda known=known: known)

    def keep_counts(self, values: Array, counts: RowCounts, unit: int = 1) -> None:
        """Counts that are known already."""
        self._units.add(unit)
        self._once(("counts", unit, id(values)), values, lambda: counts)

    def lists(
        self,
        values: Array,
        width: int,
        gate: npt.NDArray[np.bool_] | None,
        bound: Interval,
        shift: int,
    ) -> EventLists:
        """Lists of the rows of `values` that are open; arguments as of `list_events`."""

        def make() -> tuple[EventLists, npt.NDArray[np.bool_] | None]:
            room = self._entries(values, bound, shift)
            # the gate is kept with them, so that no other gate can get its id
            return list_events(as_rows(values), width, gate, bound, shift, room), gate

        return self._once(("lists", id(gate), id(values)), values, make)[0]

    def padded(self, values: Array, padding: tuple[int, int], make: Callable[[], Any]) -> Any:
        """What `make` gives, the bytes of `values` with zeros round them."""
        return self._once(("padded", padding, id(values)), values, make)

    def _entries(self, values: Array, bound: Interval, shift: int) -> int:
        """The most entries that the list of a step and image has."""
        found = self.messages(values)
        if values.dtype != np.bool_ and are_unrolled(bound, shift):
            found = self.counts(values, 1 << shift).unrolled
        assert found is not None  # integers are unrolled
        return int(found.sum(axis=2).max(initial=0))

    def _once(self, key: tuple[Any, ...], values: Array, make: Callable[[], Any]) -> Any:
        if key not in self._held:
            self._held[key] = make()
            weakref.finalize(values, self._held.pop, key, None)
        return self._held[key]


def _count(values: Array, unit: int) -> RowCounts:
    return count_rows(as_rows(values), unit)
