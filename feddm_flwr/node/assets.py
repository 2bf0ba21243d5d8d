"""A node's files of what a run builds upon: sent once, then kept beside what it caches."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from feddm_flwr.models.pretrained import KINDS
from feddm_flwr.protocol.tasks import Frames, asset_frames
from feddm_flwr.storage.atomic import whole_file


def assets_of(root: Path, wanted: str, frames: Frames) -> dict[str, Path] | None:
    """Returns the files of what a task builds upon, by kind, given JSON of their SHA-256 by kind and the message's
    frames, some of which may be such files; None where one is missing.

    Raises:
        ValueError: what was sent is something else.
    """
    return cache_sent(root, json.loads(wanted), asset_frames(frames))


def cache_sent(root: Path, wanted: Mapping[str, str], sent: Mapping[str, bytes]) -> dict[str, Path] | None:
    """Returns a node's files of what the server says is `wanted` (kind -> SHA-256), of which it `sent` some, or none;
    None where one is missing.

    Raises:
        ValueError: what was sent is something else.
    """
    files = {}
    for kind, digest in wanted.items():
        if kind not in KINDS or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"the server names an unknown asset {kind!r}, {digest!r}")
        path = files[kind] = root / "cache" / f"{digest}.safetensors"
        if path.is_file():
            os.utime(path)
            continue
        if kind not in sent:
            return None
        if hashlib.sha256(sent[kind]).hexdigest() != digest:
            raise ValueError(f"the {kind} that was sent is not the one that was announced")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(sent[kind])
    return files
