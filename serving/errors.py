"""Why a request was not taken."""

from __future__ import annotations


class QueueFull(Exception):
    """The queue is at its bound; `retry_after` seconds from now a place is likely to be free."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Draining(Exception):
    """The server finishes what it has and takes nothing new."""
