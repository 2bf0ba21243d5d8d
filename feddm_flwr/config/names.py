"""Names and numbers that keys and code share."""

from __future__ import annotations

import unicodedata

#: A node's name: it goes into logs, seeds and file names.
NODE_NAME = r"(?!\.)[\w.-]{1,64}"
NOISE_LEVELS = 10  # parts of the time steps whose losses are told apart
SCHEDULERS = ("ddim", "dpmsolver++", "unipc", "ddpm")
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


def class_name(text: str) -> str:
    """Returns a class as it is compared: a Mac writes an umlaut of a folder's name as two characters."""
    return unicodedata.normalize("NFC", text).strip()
