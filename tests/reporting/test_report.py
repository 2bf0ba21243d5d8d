"""What a run leaves to look at: figures, reports that a browser shows without an error, trackers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from flwr.app import Message, MessageType
from local_grid import config, nodes, on_train, row, run_server
from tensorboardX.proto.event_pb2 import Event

from feddm_flwr.cli.main import main
from feddm_flwr.config import ConfigError, flatten, parse
from feddm_flwr.models import parameters
from feddm_flwr.reporting import comparison_page, report, trackers
from feddm_flwr.reporting.records import read_metrics, read_rounds, status_of
from feddm_flwr.reporting.run_directory import RunDirectory
from feddm_flwr.server.evaluation import GlobalEvaluation
from feddm_flwr.storage.checkpoint import newest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def run(folder: Path, **keys: Any) -> Path:
    """A whole run of the server app, with nodes in this process."""
    c = config(
        **{"out_dir": str(folder), "sample__every": 1, "sample__count": 4, "sample__steps": 3, "eval__samples": 32}
        | keys
    )
    run_server(c)
    return folder / str(keys["run_name"])


JUDGED = {"eval__features": "random", "eval__audit": True, "eval__keep_best": "fid", "num_server_rounds": 3}


def test_a_judged_run_has_its_figures_its_best_model_and_reports_that_a_browser_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, run_name="first", **JUDGED)
    rows = read_metrics(first)
    assert all(row["fid"] > 0 and row["lipschitz"] > 0 for row in rows)
    assert rows[0]["bytes_other"] > 0  # the feature network, and the sums
    best = min(rows, key=lambda row: row["fid"])["round"]
    assert f"over {best} rounds" in (first / "best" / "README.md").read_text()
    assert (first / "model" / "model_index.json").is_file()
    final = json.loads((first / "final.json").read_text())
    assert {*final["audit"]} == {f"node-{i}" for i in range(4)}
    run(tmp_path, run_name="second", strategy="feddm-lean", **JUDGED | {"seed": 1})

    nodes = json.loads((first / "nodes.json").read_text())
    for node, count in zip(nodes, (3, 1200, 0, 7), strict=True):
        node |= {"skipped": 2 * (count == 7), "remarks": {"files passed over, .heic": count} if count else {}}
    (first / "nodes.json").write_text(json.dumps(nodes))
    assert main(["report", str(first)]) == 0
    report = first / "report.html"
    text = report.read_text()
    assert "files passed over, .heic: 1,200 at node-1, 7 at node-3, 3 at node-0<br>" in text
    assert "images that cannot be read: 2 at node-3<br>" in text
    for words in (
        "FID by round",
        "<h2>Sites</h2>",
        "Memorization audit",
        "Classes among the samples",
        "by noise level",
        "random (an",
    ):
        assert words in text
    monkeypatch.chdir(tmp_path)
    assert main(["report", "first", "second"]) == 0
    both = (tmp_path / "comparison.html").read_text()
    assert "strategy" not in both.partition("Figures")[0].partition("<h1>")[2].replace("feddm", "")
    for words in ("first", "second", "seed=1", "FID by bytes"):
        assert words in both
    for page in (text, both):
        assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)
    if not CHROMIUM:
        pytest.skip("no Chromium here")
    for page, images in ((report, 2), (tmp_path / "comparison.html", 2)):
        shown, said = browse(page, tmp_path / "browser")
        assert "CONSOLE" not in said
        assert shown.count("<img") == images
    moved, said = browse(report, tmp_path / "browser", "slider.value = 0; slider.dispatchEvent(new Event('input'));")
    assert "CONSOLE" not in said
    assert '<output id="round">1</output>' in moved


def test_an_evaluation_that_fails_or_is_killed_costs_no_round_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"eval__features": "random", "num_server_rounds": 2, "out_dir": str(tmp_path)}
    whole, figures = run(tmp_path, run_name="whole", **keys), GlobalEvaluation.figures

    def fail(error: type[BaseException], at: int) -> None:
        calls: list[int] = []

        def failing(self: GlobalEvaluation, *arguments: Any) -> dict[str, Any]:
            calls.append(1)
            if len(calls) == at:
                raise error
            return figures(self, *arguments)

        monkeypatch.setattr(GlobalEvaluation, "figures", failing)

    fail(torch.OutOfMemoryError, 1)
    rows = read_metrics(run(tmp_path, run_name="failed", **keys))
    assert ["fid" in row for row in rows] == [False, True]
    fail(KeyboardInterrupt, 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, run_name="killed", **keys)
    monkeypatch.undo()
    rows = read_metrics(run(tmp_path, run_name="killed", resume=True, **keys))
    assert json.loads((tmp_path / "killed" / "status.json").read_text())["resumed_after"] == [2]
    assert [row["fid"] for row in rows] == [row["fid"] for row in read_metrics(whole)]


def test_a_run_that_is_ended_early_ships_its_best_average_and_one_that_goes_on_chooses_anew(
    tmp_path: Path,
) -> None:
    keys: dict[str, Any] = {"eval__features": "random", "train__lr_schedule": "constant", "out_dir": str(tmp_path)}
    path = run(tmp_path, run_name="x", num_server_rounds=2, eval__average_by="none", **keys)
    assert "average_by" not in read_metrics(path)[-1]
    run(tmp_path, run_name="x", num_server_rounds=2, resume=True, **keys)
    assert read_metrics(path)[-1]["average_by"] == "fid"
    run(tmp_path, run_name="x", num_server_rounds=4, resume=True, eval__keep_best="fid", **keys)
    chosen = [row.get("average_by") for row in read_metrics(path)]
    assert chosen == [None, "fid", None, "fid"]


def test_where_no_loss_is_known_the_usual_average_is_shipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def silent(message: Message, reply: Message) -> Message:
        del reply.content.config_records["report"]
        return reply

    c = config(out_dir=str(tmp_path), run_name="x", num_server_rounds=1, eval__average_by="loss")
    run_server(c, {i: on_train(h, silent, MessageType.EVALUATE) for i, h in nodes(c).items()})
    assert "average_by" not in read_metrics(tmp_path / "x")[-1]
    assert "relative width 0.1" in (tmp_path / "x" / "model" / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"eval.average-by = 'loss' with data.eval-fraction = 0"):
        config(eval__average_by="loss", data__eval_fraction=0.0)


@pytest.mark.parametrize("by", ["fid", "loss", "none"])
def test_the_average_that_is_best_by_what_was_asked_for_is_shipped(by: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"num_server_rounds": 3, "eval__average_by": by, "out_dir": str(tmp_path)}
    if by == "fid":
        keys |= {"eval__features": "random"}
    if by == "loss":
        keys |= {"eval__features": "random", "eval__audit": True}  # which is asked for beside
    path = run(tmp_path, run_name="whole", **keys)
    *before, last = read_metrics(path)
    tensors = newest(path / "checkpoints").tensors
    of_width = {"0": tensors["weights"], "0.05": tensors["ema.0.05"], "0.1": tensors["ema.0.1"]}
    assert all("average_width" not in row for row in before)
    tried = last.get("average_tried", {"0.1": 0.0})
    assert set(tried) == ({"0.1"} if by == "none" else set(of_width))
    chosen = min(tried, key=lambda width: tried[width])
    assert by == "none" or last["average_width"] == float(chosen)
    shipped = UNet2DModel.from_pretrained(path / "model" / "unet")
    np.testing.assert_array_equal(parameters.to_vector(shipped), of_width[chosen])
    assert ("best of several by" in (path / "model" / "README.md").read_text()) == (by != "none")
    if by == "fid":
        assert last["fid"] == tried[chosen]  # of as many samples
    # Nothing is chosen anew where a run that was done is gone on with.
    (path / "model" / "README.md").unlink()
    assert read_metrics(run(tmp_path, run_name="whole", resume=True, **keys)) == [*before, last]
    assert ("best of several by" in (path / "model" / "README.md").read_text()) == (by != "none")


def test_a_run_goes_on_with_nodes_of_the_kind_that_it_had_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("feddm_flwr.server.run.simulated", lambda grid: True)
    path = run(tmp_path, run_name="x", num_server_rounds=1)
    text = (path / "report.html").read_text()
    assert "feddm run --num-supernodes 4 -c" in text
    assert "· iid ·" in text
    assert "data.partition" in (path / "model" / "README.md").read_text()
    monkeypatch.setattr("feddm_flwr.server.run.simulated", lambda grid: False)
    with pytest.raises(ConfigError, match="was a simulation, and cannot go on otherwise: feddm run local --resume"):
        run(tmp_path, run_name="x", num_server_rounds=1, resume=True)
    path = run(tmp_path, run_name="y", num_server_rounds=1)
    text = (path / "report.html").read_text()
    assert "feddm run SUPERLINK -c" in text
    assert "· iid ·" not in text  # their images are what they are
    assert "data.partition" not in (path / "model" / "README.md").read_text()
    assert main(["run", "--resume", str(path)]) == 2
    assert "was one of real nodes, and cannot go on otherwise: feddm run SUPERLINK" in capsys.readouterr().err


def browse(page: Path, home: Path, script: str = "") -> tuple[str, str]:
    """The page as a browser has it in the end, and what it logged; nothing can be fetched."""
    if script:
        page = page.with_name("moved.html")
        source = page.with_name("report.html").read_text()
        page.write_text(source.replace("</body>", f"<script>{script}</script></body>"))
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}"),
            *("--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=3000"),
            *("--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_tracker_gets_figures_and_grids(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    folder = run(tmp_path, run_name="tracked", tracker=kind)
    losses = [row["train_loss"] for row in read_metrics(folder)]
    if kind == "wandb":
        (written,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
        assert b"train_loss" in written.read_bytes()
        assert list((folder / "wandb").rglob("*.png"))
        return
    from mlflow import MlflowClient

    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("feddm").experiment_id])
    assert found.info.status == "FINISHED"
    assert [m.value for m in client.get_metric_history(found.info.run_id, "train_loss")] == losses
    assert found.data.params["train.batch-size"] == "8"
    assert "samples/round-0002.png" in {a.path for a in client.list_artifacts(found.info.run_id, "samples")}


def test_a_tracker_that_fails_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def log(self, figures: Any, number: int) -> None:
            raise ConnectionError("away")

        image = finish = log

    tracker = trackers.Unfailing("wandb", Broken())  # type: ignore[arg-type]
    with caplog.at_level("WARNING", "feddm"):
        for number in range(5):
            tracker.log({}, number)
    assert caplog.text.count("tracker = 'wandb': ConnectionError: away; the run goes on") == 3
    assert "it is left alone from here on" in caplog.text


def events(folder: Path) -> list[Event]:
    """What TensorBoard reads of a folder; a record is its length, a checksum, itself, another."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


@pytest.mark.parametrize("after", [0, 3])
def test_tensorboard_has_every_figure_and_a_full_disk_does_not_hang_it(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (board,) = trackers.make("none", tmp_path, "x", {}, after)
    board.log({"loss": 0.5, "fid": 40.0}, 4)
    written = events(tmp_path / "tensorboard")
    assert [e.step for e in written if e.HasField("session_log")] == [after + 1]  # later ones of before are forgotten
    assert [(e.step, v.tag, v.simple_value) for e in written for v in e.summary.value] == [
        *((4, "loss", 0.5), (4, "fid", 40.0))
    ]

    def full(self: object, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
    for number in (5, 6):
        board.log({f"figure-{i}": 1.0 for i in range(40)}, number)
    assert caplog.text.count("tracker = 'tensorboard': OSError: [Errno 28] No space left on device") == 2


def test_runs_that_differ_in_their_nodes_are_not_the_same_and_a_loss_is_set_beside_the_bytes_that_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {}
    for name, count in (("few", 2), ("many", 3)):
        own = RunDirectory(tmp_path / name)
        own.begin(flatten(parse({})), None)
        for number in (1, 2, 3):
            own.log_round(row(number, connected=count, eval_loss=1, bytes_up=1e6, bytes_down=1e6))
        own.finish("completed")
        rows[name] = read_rounds(own.path)
    text = comparison_page.write_comparison([tmp_path / "few", tmp_path / "many"], tmp_path / "both.html").read_text()
    assert "2 nodes" in text
    assert "3 nodes" in text
    assert "the same configuration" not in text
    drawn = []
    monkeypatch.setattr(report.charts, "dots", lambda *arguments: drawn.append(arguments[0]))
    comparison_page._compared(rows)
    assert drawn == [{"few": [(4.0, 1)], "many": [(4.0, 1)]}]  # of two rounds: the third evaluated what they came to
    comparison_page._compared({name: own[:1] for name, own in rows.items()})
    assert len(drawn) == 1


def test_a_line_that_a_killed_run_was_writing_is_passed_over_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"round": 1}\n{"round": 2}\n{"rou')
    assert [row["round"] for row in read_metrics(tmp_path)] == [1, 2]
    file.write_text('{"round": 1}\n{"ro\n{"round": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is damaged: .*; mend or remove it"):
        read_metrics(tmp_path)


def test_a_run_that_was_killed_is_not_shown_as_running(tmp_path: Path) -> None:
    run = tmp_path / "killed"
    code = f"""
import os, pathlib
from feddm_flwr.reporting import records, run_directory
from feddm_flwr.config import flatten, parse
run = run_directory.RunDirectory(pathlib.Path({str(run)!r}))
run.begin(flatten(parse({{}})), None)
print(records.status_of(run.path), flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "running\n", done.stderr
    assert status_of(run) == "stopped"
    assert "feddm run --resume goes on with it" in report.write(run).read_text()


def test_a_tracker_that_takes_no_runs_is_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(ConfigError, match=r"tracker = 'mlflow': .*; its environment variables say where it is"):
        trackers.make("mlflow", tmp_path, "x", {}, None)
