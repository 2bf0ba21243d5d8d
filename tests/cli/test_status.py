"""How far a run is: said by `feddm status`, by a file for Prometheus, and by a report that is written meanwhile."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_grid import config, run_server

from feddm_flwr.cli.main import main
from feddm_flwr.config import flatten, parse
from feddm_flwr.reporting.records import as_line, read_metrics
from feddm_flwr.reporting.run_directory import RunDirectory
from feddm_flwr.server import outputs

SAMPLE = re.compile(r'feddm_[a-z_]+\{run="((?:[^"\\\n]|\\.)*)"\} (-?[\d.]+(?:e-?\d+)?)')


def figures(run: Path) -> dict[str, float]:
    lines = [line for line in (run / "metrics.prom").read_text().splitlines() if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) for line in lines)
    return {line.partition("{")[0].removeprefix("feddm_"): float(line.rpartition(" ")[2]) for line in lines}


def test_a_run_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[str] = []
    seen: list[dict[str, float]] = []
    write, run = outputs.write_report, tmp_path / "runs" / "a"

    def spy(of: RunDirectory) -> None:
        write(of)
        pages.append((run / "report.html").read_text())
        if (run / "metrics.prom").exists():
            seen.append(figures(run))
            assert main(["status", str(run)]) == 0

    monkeypatch.setattr(outputs, "write_report", spy)
    monkeypatch.setattr(outputs, "_REPORT_EVERY", -1.0)
    keys = {"out_dir": str(tmp_path / "runs"), "run_name": "a", "sample__every": 0, "sample__count": 4}
    run_server(config(**keys, sample__steps=3, num_server_rounds=3))
    said = capsys.readouterr().out
    pages, seen = pages[:3], seen[:2]  # without those of the end
    assert [f"<b>{i} / 3</b>" in page for i, page in enumerate(pages)] == [False, True, True]  # none before the first
    assert all('http-equiv="refresh"' in page for page in pages)
    assert [f["rounds"] for f in seen] == [1, 2]
    assert all(f["running"] == 1 for f in seen)
    assert f"{run}: running, round 2 of 3, about " in said
    assert "  nodes     4 online, 4 replies in the last round" in said

    assert 'http-equiv="refresh"' not in (run / "report.html").read_text()
    rows, found = read_metrics(run), figures(run)
    assert found["bytes_up_total"] == sum(row["bytes_up"] for row in rows)
    assert found["replies_ok_total"] == 12
    assert found["train_loss"] == rows[-1]["train_loss"]
    assert (found["running"], found["rounds"], found["rounds_asked"]) == (0, 3, 3)
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0  # the newest
    assert "runs/a: completed, round 3 of 3\n" in capsys.readouterr().out

    for age, row in zip((300, 0), rows[:2], strict=True):
        row |= {"seconds": 1900.0, "failures": {"node-3 timeout": 2} if age else {}}
    (run / "metrics.jsonl").write_bytes(b"".join(map(as_line, rows[:2])))
    (run / "status.json").write_text(json.dumps({"status": "running"}))
    os.utime(run / "metrics.jsonl", times=(time.time() - 3700,) * 2)
    os.utime(run / "config.toml", times=(time.time() - 4000,) * 2)
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "stopped, round 2 of 3\n  why       the process was killed" in said
    assert "  failures  2 replies: 2 node-3 timeout; last in round 1" in said
    assert "  last word 1 h 1 min ago" in said


@pytest.mark.parametrize(
    ("of", "message"),
    [("nothing", "SUPERLINK = 'nothing': no such connection"), (".", "not a run's folder"), ("", "no run in runs/")],
)
def test_what_is_no_run_is_refused(
    of: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert main(["status", *filter(None, [of])]) == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_told_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin(flatten(parse({})), None)
    near, far = os.pipe()
    os.close(near)
    start = "import sys; from feddm_flwr.cli.main import main; sys.exit(main())"
    try:
        line = [sys.executable, "-c", start, "status", run.path]
        done = subprocess.run(line, stdout=far, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(far)
    assert (done.returncode, done.stderr) == (1, b"")
