"""Rows that cannot be used: the first ends the run, or they are left out and counted."""

from __future__ import annotations

from mtptrain.config import OnBadRow
from mtptrain.errors import UserError

NUM_NAMED = 3  # bad rows that a summary names


class BadRows:
    """The bad rows of one source.

    Args:
        policy: `data.on_bad_row`.
    """

    def __init__(self, policy: OnBadRow) -> None:
        self.policy = policy
        self.count = 0
        self.first: list[str] = []

    def add(self, reason: UserError) -> None:
        """Count a bad row.

        Raises:
            UserError: bad rows are not left out.
        """
        if self.policy is OnBadRow.error:
            raise UserError(f"{reason}; data.on_bad_row=skip leaves such rows out") from None
        self.count += 1
        if len(self.first) < NUM_NAMED:
            self.first.append(str(reason))

    def summary(self) -> str:
        """Return the number of bad rows and the first of them, or an empty text if there is none."""
        if not self.count:
            return ""
        more = f"; and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return f"{self.count} bad row{'s' * (self.count > 1)} left out: {'; '.join(self.first)}{more}"
