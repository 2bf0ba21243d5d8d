"""The queue of what is measured on a GPU: laws of its order, its limits, and of going on elsewhere."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu

SLOW = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); time.sleep(60)"


def job(name: str, code: str, limit: float = 30.0, **more: Any) -> gpu.Job:
    return gpu.Job(name, ["-c", code], limit, json.loads, **more)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_each_job_is_done_once_and_one_that_failed_after_the_others(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    once = f"import pathlib; p = pathlib.Path({str(marker)!r}); print(len(p.read_text()) if p.exists() else 1 / 0)"
    queue = [job("fails", once), job("works", "print([1, 2])")]
    gpu.work(tmp_path, queue, 60)
    assert [line["job"] for line in lines(tmp_path)] == ["fails", "works"]
    assert "ZeroDivisionError" in lines(tmp_path)[0]["failed"]
    assert lines(tmp_path)[1]["found"] == [1, 2]
    marker.write_text("there")
    gpu.work(tmp_path, [*queue, job("new", "print(3)")], 60)
    assert [(line["job"], line.get("found")) for line in lines(tmp_path)[2:]] == [("new", 3), ("fails", 5)]


def test_a_job_ends_at_its_limit_and_what_has_no_time_is_left(tmp_path: Path) -> None:
    gpu.work(tmp_path, [job("slow", SLOW, 2.0), job("quick", "print(1)")], 60)
    slow, quick = lines(tmp_path)
    assert slow["failed"].startswith("exit 124")
    assert slow["seconds"] < 20
    assert quick["found"] == 1
    gpu.work(tmp_path, [job("late", "print(1)")], 30)
    assert len(lines(tmp_path)) == 2


def test_what_says_nothing_that_can_be_read_has_failed(tmp_path: Path) -> None:
    gpu.work(tmp_path, [job("words", "print('no figure')")], 60)
    assert lines(tmp_path)[0]["failed"].startswith("JSONDecodeError")


def test_another_machine_goes_on_from_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    gpu.work(here, [job("first", "print(1)")], 60)
    (here / "large").write_bytes(b"0" * 2000)
    monkeypatch.setattr(gpu, "_WITHIN", 1000)
    archive = gpu.pack(here)
    assert "left out of here.tar.gz: large" in capsys.readouterr().out
    with tarfile.open(archive) as packed:
        packed.extractall(there, filter="data")
    gpu.work(there, [job("first", "print(1)"), job("second", "print(2)")], 60)
    assert [line["job"] for line in lines(there)] == ["first", "second"]


def test_a_queue_that_is_killed_goes_on_elsewhere_with_what_is_left(tmp_path: Path) -> None:
    """The real one, as far as it is quick: the tests, which are skipped where there is no GPU, and a training."""
    line = [sys.executable, "benchmarks/gpu.py", "--toy", "--minutes", "9", "--only", "t", "--out"]
    queue = subprocess.Popen([*line, str(tmp_path / "here")], cwd=gpu.ROOT, stdout=subprocess.PIPE, text=True)
    assert queue.stdout is not None
    assert next(queue.stdout).startswith("tests: done")
    queue.send_signal(signal.SIGINT)  # in the middle of the training
    queue.communicate(timeout=60)
    assert [line["job"] for line in lines(tmp_path / "here")] == ["tests"]
    archive = str(tmp_path / "here.tar.gz")
    subprocess.run([*line, str(tmp_path / "there"), "--take", archive], cwd=gpu.ROOT, check=True, timeout=300)
    tests, trained = lines(tmp_path / "there")
    assert "skipped" in tests["found"] or "passed" in tests["found"]
    assert trained["job"] == "throughput fashionmnist-28-small 2"
    assert trained["found"], trained


def test_every_job_of_the_queue_is_one_that_there_is(tmp_path: Path) -> None:
    for toy in (False, True):
        queue = gpu.jobs(tmp_path, "x.parquet", toy)
        assert len({one.name for one in queue}) == len(queue)
        for one in queue:
            scripts = [gpu.ROOT / str(part) for part in one.command if str(part).endswith((".py", ".toml"))]
            assert all(path.exists() for path in scripts), one.name
