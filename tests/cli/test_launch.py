"""Following a run: what is said of it, and that it is stopped, whatever becomes of the terminal."""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from feddm_flwr.cli import launch
from feddm_flwr.cli.progress import Display
from feddm_flwr.config import ConfigError, parse

ROOT = Path(__file__).parents[2]


def test_a_run_is_stopped_though_its_terminal_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flwr = tmp_path / "flwr"
    flwr.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ $1 = run ] || exit 0\n'
        "echo Successfully started run 7\nexec sleep 10\n"
    )
    flwr.chmod(0o755)

    def closed(self: Display, text: str) -> None:
        raise OSError(5, "Input/output error")

    followed = threading.Event()
    monkeypatch.setattr(Display, "take", lambda self, line: followed.set())

    def hang_up() -> None:
        followed.wait()
        monkeypatch.setattr(Display, "print", closed)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # which waits for the next line

    threading.Thread(target=hang_up, daemon=True).start()
    remote = launch.Remote(argparse.Namespace(superlink="site"), {"PATH": f"{tmp_path}:/usr/bin:/bin"})
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert launch.follow(ROOT, remote, {}, parse({}), verbose=False) == launch.STOPPED
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "stop 7 site"


def test_what_a_node_says_is_not_taken_for_the_number_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flwr = tmp_path / "flwr"
    flwr.write_text(
        "#!/bin/sh\n[ $1 = run ] && echo Successfully started run 7 && echo left out: Successfully started run 3\n"
        "status=failed; [ $2 = --run-id=3 ] && status=completed\n"
        '[ $1 = ls ] && echo "{\\"runs\\": [{\\"status\\": \\"finished:$status\\", '
        '\\"status-details\\": \\"\\"}]}"\nexit 0\n'
    )
    flwr.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    monkeypatch.setenv("PATH", path)
    remote = launch.Remote(argparse.Namespace(superlink="site"), {"PATH": path})
    assert launch.follow(ROOT, remote, {}, parse({}), verbose=False) == 1
    assert "the run failed (finished:failed)" in capsys.readouterr().err


def test_the_nodes_get_what_flower_would_send_of_the_whole_folder(tmp_path: Path) -> None:
    assert build_fab_from_disk(launch._staged(ROOT, tmp_path)) == build_fab_from_disk(ROOT)


def test_the_time_left_is_estimated_from_the_rounds_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    display = Display(parse({"num-server-rounds": 100}))
    for number in (51, 52):  # it was resumed
        display.take(f"feddm: round={number}/100 asked=4")
        now[0] += 60
        display.take(f"feddm: round={number}/100 loss=0.1 eval=nan ok=4 failed=0 up=1 down=1 seconds=60.0")
    assert display._bar.tasks[0].fields["left"] == "about 48:00 left"


def test_sockets_are_in_a_short_folder_whatever_tmpdir_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / ("x" * 80)
    job.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(job))
    assert len(str(launch._short_folder())) <= 24
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match=f"TMPDIR = '{job}': is too long for sockets; set it to a folder of at most"):
        launch._short_folder()


def test_a_cluster_that_does_not_answer_is_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself waits for ever."""
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{there.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS = '{address}': no cluster of Ray answers there"):
            launch._check_cluster(address)
        there.listen()
        launch._check_cluster(address)
    launch._check_cluster("auto")


def test_files_that_ray_needs_may_be_open_or_no_run_begins() -> None:
    code = (
        "import resource, sys; from feddm_flwr.cli.launch import _allow_files; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1]))); _allow_files(); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = [
        subprocess.run([sys.executable, "-c", code, hard], capture_output=True, text=True, check=False)
        for hard in ("1024", "64")
    ]
    assert done[0].stdout.strip() == "(1024, 1024)"
    assert "ulimit -n = 64 is not allowed: a simulation needs at least 256 open files" in done[1].stderr
