"""What becomes of samples that cannot be used: the run ends at the first, or replaces, counts and names them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fcmae.errors import DataError

NAMED = 20  # samples named in full; the others are counted
JUDGED_FROM = 1000  # samples drawn before their share is judged


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class Faults:
    """Bad samples of one loader, as seen by the process that trains.

    max_fraction: the largest share of the samples drawn that may be bad. report: takes a line for the user.
    """

    max_fraction: float = 0.01
    report: Callable[[str], None] = _to_stderr
    drawn: int = 0
    count: int = 0
    _known: set[int] = field(default_factory=set)

    def total(self) -> int:
        """Samples that were not usable so far."""
        return self.count

    def note(self, drawn: int, bad: Iterable[tuple[int, str]]) -> None:
        """Count a batch of `drawn` samples, `bad` of which (sample, reason) were not usable.

        Raises:
            DataError: if the share is larger than `max_fraction`, once 1,000 samples have been drawn.
        """
        self.drawn += drawn
        last = ""
        for sample, reason in bad:
            self.count += 1
            last = reason
            if sample in self._known:
                continue
            self._known.add(sample)
            if len(self._known) <= NAMED:
                self.report(f"left out: {reason}")
            elif len(self._known) == NAMED + 1:
                self.report("left out: more than these; from here on they are only counted")
        if last and self.drawn >= JUDGED_FROM and self.count > self.max_fraction * self.drawn:
            raise DataError(
                f"{self.count:,} of {self.drawn:,} samples could not be used, more than "
                f"data.max_bad_fraction={self.max_fraction:g}; the last: {last}"
            )
