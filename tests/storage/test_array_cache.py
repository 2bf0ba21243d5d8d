"""Arrays that are kept: whole or not at all, made by one process."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np

from feddm_flwr.storage.array_cache import array, cached, facts, new_array, write_facts


def test_an_array_has_its_room_on_the_disk_before_it_is_written_to(tmp_path: Path) -> None:
    """Written through a mapping, a disk without room would kill the process."""
    new_array(tmp_path, "images", (100, 3, 64, 64), np.uint8)
    assert (tmp_path / "images.npy").stat().st_blocks * 512 >= 100 * 3 * 64 * 64


def test_of_what_changes_often_old_copies_do_not_stay(tmp_path: Path) -> None:
    def entry(key: str, version: str) -> Path:
        return cached(tmp_path, {"what": key}, version, lambda folder: write_facts(folder, {}))

    other, old, recent = entry("another", "1"), entry("x", "1"), entry("x", "2")
    long_ago = time.time() - 2 * 3600
    for folder in (other, old):
        os.utime(folder, (long_ago, long_ago))
    assert entry("x", "3").is_dir()
    assert [folder.exists() for folder in (other, old, recent)] == [True, False, True]


def fill_slowly(root: Path, index: int) -> None:
    def fill(folder: Path) -> None:
        with (root / "filled").open("a") as log:
            log.write(f"{index}\n")
        time.sleep(0.3)
        new_array(folder, "x", (4,), np.float32)[:] = 7
        write_facts(folder, {"by": index})

    folder = cached(root, {"what": "x"}, "1", fill)
    assert array(folder, "x").tolist() == [7, 7, 7, 7]
    assert str(facts(folder)["by"]) == (root / "filled").read_text().strip()


def test_of_many_processes_one_makes_what_all_use(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill_slowly, args=(tmp_path, i)) for i in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * 6
