"""What a run that failed failed of, in one line, from what Flower and Ray wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: What Flower says of a run that ended in whatever error.
_GENERIC = ("An error was encountered. Ending simulation.", "Simulation Runtime crashed.")
#: What it says, and what that means.
_MEANINGS = {
    "No heartbeat received": "its process was killed, perhaps for want of memory (dmesg tells)",
    "node timed out during startup": "Ray did not start, perhaps for want of memory or files (ulimit -a tells)",
}
_ERROR = re.compile(r"(?:\([^)]*\) )?([A-Za-z_][\w.]*(?:Error|Exception|Died|Timeout|Exit)\w*|Exception)(?:: (.*))?$")
_JOINED = ("The above exception was the direct cause", "During handling of the above exception")


def cause(details: str, log: Iterable[str]) -> str:
    """Returns what a run failed of: Flower's `details` where they say it, else what the last traceback of a log began
    with, or the text in Flower's last box; "" where there is none of these."""
    if not details or any(generic in details for generic in _GENERIC):
        details = _cause_in(log) or details
    return next((f"{details.rstrip('.')}: {means}" for said, means in _MEANINGS.items() if said in details), details)


def _cause_in(log: Iterable[str]) -> str:
    error, box, joined = "", "", False
    for line in map(str.rstrip, log):
        if match := _ERROR.match(line):
            if not joined or not error:
                error = f"{match[1].rpartition('.')[2]}: {match[2] or ''}".removesuffix(": ")
            joined = False
        elif line.startswith(_JOINED):
            joined = True
        elif line.startswith("╭"):
            box = ""
        elif line.startswith("│"):
            box = f"{box} {line.strip('│ ')}".strip()
    return error or box
