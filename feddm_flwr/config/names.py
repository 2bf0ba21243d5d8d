"""Names and numbers that keys and code share."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping

#: A node's name: it goes into logs, seeds and file names.
NODE_NAME = r"(?!\.)[\w.-]{1,64}"
#: How many classes a node tells the server of one by one, and how many characters they may take.
MOST_CLASSES, MOST_CLASS_TEXT = 10_000, 300_000
NOISE_LEVELS = 10  # parts of the time steps whose losses are told apart
#: How samples are drawn, the usual way first; of models trained by flow matching, too.
SCHEDULERS = ("unipc", "dpmsolver++", "ddim", "ddpm")
FLOW_SCHEDULERS = ("euler", "heun")
#: Keys that act with one `data.partition` only.
PARTITION_OF = {
    "data.alpha": "dirichlet",
    "data.classes-per-node": "pathological",
    "data.shards-per-node": "shard",
    "data.natural-column": "natural",
}
SPARSE_CODECS = frozenset({"topk", "budget"})  # of which most values decode to 0
#: What `codec.uplink` and `codec.downlink` may be, from the most bytes to the fewest.
CODECS = ("none", "fp16", "bf16", "int8", "int4", "int3", "int2", "sign", "topk", "budget")
LEAST_OF_SUM = 3  # nodes, for one to be left out, or not to be seen
SUM = "sum"  # what `codec.uplink` is where the server learns nothing but sums


def class_name(text: str) -> str:
    """Returns a class as it is compared: a Mac writes an umlaut of a folder's name as two characters."""
    return unicodedata.normalize("NFC", text).strip()


def may_be_told(class_counts: Mapping[str, int]) -> bool:
    """Tells whether a node's counts of its classes are few enough to be sent one by one. Where each patient, or each
    file, has a class of its own, they are not."""
    return len(class_counts) <= MOST_CLASSES and len(json.dumps(class_counts)) <= MOST_CLASS_TEXT
