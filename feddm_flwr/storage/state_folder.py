"""Where a machine's nodes keep what they remember of runs, and when that is removed."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

from feddm_flwr.storage.atomic import forgotten

log = logging.getLogger(__name__)

RUN_UUID = r"[0-9a-f]{32}"  # the name of a run's folder


def state_root(configured: str | None) -> Path:
    """Returns `state-path` of the node config, else `feddm` in the user's XDG state folder.

    Raises:
        FileNotFoundError: neither is set, and this user has no home folder.
    """
    if configured:
        return Path(configured).expanduser()
    if own := os.environ.get("XDG_STATE_HOME"):
        return Path(own) / "feddm"
    try:
        return Path.home() / ".local" / "state" / "feddm"
    except RuntimeError:  # a container's user who is not in its passwd
        text = "this user has no home folder; set XDG_STATE_HOME to a folder that can be written"
        raise FileNotFoundError(errno.ENOENT, text) from None


def check_writable(root: Path) -> None:
    """Makes the folder and a file in it.

    Raises:
        OSError: that cannot be done.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=root):
        pass


def node_folder(root: Path, run: str, node: str) -> Path:
    """Makes and returns the folder of a node in a run; removes what runs left that nobody touched for two weeks.

    Raises:
        ValueError: `run` is not a run-uuid (it is the server's word, and becomes a path).
        OSError: the folder cannot be made.
    """
    if not re.fullmatch(RUN_UUID, run):
        raise ValueError(f"run-uuid = {run!r} is not 32 hex digits")
    path = root / run / node
    if not path.is_dir():
        (root / run).mkdir(mode=0o700, parents=True, exist_ok=True)  # a model tells of the images
        path.mkdir(exist_ok=True)
        forget_old(root, run)
    return path


def forget_run(root: Path, run: str) -> None:
    """Removes what the nodes of this machine kept of a run that is over."""
    shutil.rmtree(root / run, ignore_errors=True)


def forget_old(root: Path, run: str) -> None:
    """Removes the folders of other runs that nobody wrote to for two weeks, but no node's own model."""
    for folder in root.iterdir():
        if not re.fullmatch(RUN_UUID, folder.name) or folder.name == run:
            continue
        try:
            if any(folder.glob("*/pipeline")):
                continue
            touched = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:  # another node was faster
            continue
        if forgotten(touched):
            log.info("removing %s: nobody used it for two weeks", folder)
            shutil.rmtree(folder, ignore_errors=True)
