"""Why there is no good reply, or no run: in the words that logs and metrics.jsonl use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """Why there is no good reply: a short reason that is counted, and a line for the log."""

    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.text}"


def clean(text: str, limit: int = 300) -> str:
    """Returns text of a node on one printable line of bounded length: it cannot forge lines of the log."""
    return "".join(c if c.isprintable() else " " for c in text[: 4 * limit]).strip()[:limit]


class RunFailedError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""
