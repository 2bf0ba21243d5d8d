"""The last line of a run that failed is what it failed of."""

from __future__ import annotations

import pytest

from feddm_flwr.cli.failure import cause

CHAIN = """INFO : something before
Traceback (most recent call last):
  File "node.py", line 1012, in _prepare_socket_file
OSError: AF_UNIX path length cannot exceed 107 bytes: /scratch/ray

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
RuntimeError: Simulation Runtime crashed.

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
RuntimeError: An error was encountered. Ending simulation.
"""
BOX = """Using SuperLink: site
╭─ Error ─────────────────────╮
│ Connection to the SuperLink │
│ is unavailable.             │
╰─────────────────────────────╯
"""


@pytest.mark.parametrize(
    ("details", "log", "said"),
    [
        ("", CHAIN, "OSError: AF_UNIX path length cannot exceed 107 bytes: /scratch/ray"),
        ("An error was encountered. Ending simulation.", CHAIN, "OSError: AF_UNIX path length"),
        ("min-nodes = 9", CHAIN, "min-nodes = 9"),
        (
            "",
            "(pid=7) ray.exceptions.OutOfMemoryError: the node ran low\nINFO : end\n",
            "OutOfMemoryError: the node ran",
        ),
        ("", CHAIN + "ValueError: a later one\n", "ValueError: a later one"),
        (
            "Simulation Runtime crashed.",
            "Exception: The current node timed out during startup.\n",
            "Exception: The current node timed out during startup: Ray did not start, perhaps for want of memory",
        ),
        ("", BOX, "Connection to the SuperLink is unavailable."),
        ("No heartbeat received from the task", "", "No heartbeat received from the task: its process was killed"),
        ("An error was encountered. Ending simulation.", "", "An error was encountered"),
        ("", "nothing\n", ""),
    ],
)
def test_the_cause_is_found(details: str, log: str, said: str) -> None:
    found = cause(details, log.splitlines(keepends=True))
    assert found.startswith(said)
    assert bool(found) == bool(said)
