"""Comparing runs: what is run, going on where it was stopped, tables and plots."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from local_grid import nodes, run_server

from feddm_flwr.cli import comparison, comparison_tables
from feddm_flwr.cli import main as cli
from feddm_flwr.cli.arguments import run_config_keys
from feddm_flwr.cli.options import parser
from feddm_flwr.cli.run import resumed_keys
from feddm_flwr.config import ConfigError, parse

FILE = """
num-supernodes = 4
common = { "model.preset" = "tiny", num-server-rounds = 2, "train.local-steps" = 2, "train.batch-size" = 8 }
[runs.vanilla]
[runs.lean]
strategy = "feddm-lean"
[runs.centralized]
centralized = true
[conditions.iid]
[conditions.skewed]
data.partition = "dirichlet"
data.alpha = 0.1
"""
QUICK = {"eval.features": "random", "eval.samples": 16, "sample.steps": 2, "sample.count": 1, "sample.every": 0}


def in_process(arguments: list[str]) -> int:
    """`feddm run local …`, with nodes in this process."""
    chosen = parser().parse_args(arguments)
    keys = run_config_keys(chosen.run_config)
    if chosen.resume:
        keys = resumed_keys(chosen) | keys
    config = parse(keys)
    run_server(config, nodes(config, chosen.num_supernodes))
    return 0


def test_every_run_is_done_once_under_each_condition_and_seen_as_many_images(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(FILE)
    cells = comparison.cells(str(tmp_path / "x.toml"), QUICK, None, None)
    assert [c.name for c in cells][:3] == ["iid-vanilla-seed-0", "iid-lean-seed-0", "iid-centralized-seed-0"]
    ran: list[str] = []

    def feddm(arguments: list[str]) -> int:
        ran.append(arguments[-1])
        return in_process(arguments)

    for _ in range(2):
        assert not any(comparison.do(cell, tmp_path, feddm) for cell in cells)
    assert len(ran) == 5  # and none again: training on all images is the same under both conditions
    results = [comparison.result(cell, tmp_path) for cell in cells]
    assert {r["images"] for r in results} == {2 * 4 * 2 * 8}
    assert {r["nodes"] for r in results if r["run"] == "centralized"} == {1}
    assert all(r["fid"] > 0 and 0 <= r["coverage"] <= 1 for r in results)
    text = comparison_tables.markdown(results)
    assert "**skewed**" in text
    assert "| lean | " in text
    assert "16 samples of the shipped weights" in text
    assert "features of random" in text
    assert comparison_tables.table(results).count("\n") == 7
    pictures = comparison_tables.plots(results, tmp_path)
    assert [p.name for p in pictures] == ["fid-by-bytes.png", "fid-by-round.png", "fid-by-condition.png"]
    assert all(p.stat().st_size > 10_000 for p in pictures)
    changed = comparison.cells(str(tmp_path / "x.toml"), {**QUICK, "train.batch-size": 4}, None, None)
    with pytest.raises(ConfigError, match="was run with other keys; choose another --output"):
        comparison.do(changed[0], tmp_path, feddm)


def test_all_images_are_trained_on_for_as_long_as_the_nodes_together(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(FILE)
    limits = {"round-timeout": 100.0, "train.max-seconds": 9.0, "fraction-train": 0.5, "finish.rounds": 1}
    centralized = comparison.cells(str(tmp_path / "x.toml"), {**QUICK, **limits}, None, None)[2]
    config = parse(centralized.keys)
    assert (config.train.local_steps, config.round_timeout, config.train.max_seconds) == (4, 200.0, 0.0)
    assert config.finish.local_steps == 2 * 4
    assert config.eval.min_images == 0
    assert config.train.moments == "node"
    private = {"privacy.mechanism": "dp-sgd", "privacy.epsilon": 8.0, "eval.features": "none"}
    for keys in ({"train.moments": "reset"}, {"train.optimizer": "sgd"}, private):
        one = comparison.cells(str(tmp_path / "x.toml"), {**QUICK, **keys}, None, None)[2]
        assert parse(one.keys).train.moments == "reset"
    with pytest.raises(ConfigError, match=r"'centralized': centralized = true needs train.local-steps"):
        comparison.cells(str(tmp_path / "x.toml"), {"train.local-steps": 0, "train.local-epochs": 1}, None, None)


def test_a_data_parallel_run_takes_the_steps_of_one_node_on_the_batches_of_all(tmp_path: Path) -> None:
    text = FILE.replace("[conditions.iid]", "[runs.together]\ndata-parallel = true\n[conditions.iid]")
    (tmp_path / "x.toml").write_text(text)
    cells = comparison.cells(str(tmp_path / "x.toml"), {**QUICK, "fraction-train": 0.5}, None, None)
    together = next(c for c in cells if c.run == "together")
    config = parse(together.keys)
    assert (together.nodes, config.train.local_steps, config.train.batch_size) == (1, 2, 2 * 8)
    assert config.train.moments == "node"
    assert config.server.ema_decay == parse(cells[0].keys).server.ema_decay  # as many steps
    assert [c.shared for c in cells if c.run == "together"] == ["", together.name]  # one on all images knows no shares
    for cell in (cells[0], together):
        assert not comparison.do(cell, tmp_path, in_process)
    results = [comparison.result(cell, tmp_path) for cell in (cells[0], together)]
    assert len({r["images"] for r in results}) == 1
    (tmp_path / "x.toml").write_text(text.replace("data-parallel = true", "data-parallel = true\ncentralized = true"))
    with pytest.raises(ConfigError, match="'together': centralized and data-parallel are two runs"):
        comparison.cells(str(tmp_path / "x.toml"), QUICK, None, None)


def test_fids_are_over_both_kinds_of_runs_on_all_images() -> None:
    row = {"condition": "", "kid": None, "coverage": None, "eval_loss": None, "features": "x", "samples": 9, "real": []}
    row |= {f"bytes_{way}": 1 for way in ("up", "up_fp32", "down", "down_fp32")}
    row |= {"keys": {}, "images": 100, "rounds": 4}
    rows = [
        {**row, "run": run, "pooled": run if nodes == 1 else "", "nodes": nodes, "fid": fids[-1], "fid_by_round": by}
        for run, nodes, fids in (("centralized", 1, [9.0, 2.0]), ("data-parallel", 1, [9.0, 4.0]), ("a", 4, [2.0, 1.0]))
        for by in [[[2, fids[0]], [4, fids[1]]]]
    ]
    heads, _, *lines = (line.split("|")[1:-1] for line in comparison_tables.markdown(rows).splitlines()[:5])
    assert [head.strip() for head in heads[3:6]] == [
        "over centralized",
        "over data-parallel",
        "images to centralized FID",
    ]
    assert [[cell.strip() for cell in line[3:6]] for line in lines] == [
        ["1.000", "0.500", "100"],
        ["2.000", "1.000", "–"],
        ["0.500", "0.250", "50"],
    ]


def test_fids_of_other_images_or_samples_are_not_divided() -> None:
    row = {"condition": "", "kid": None, "coverage": None, "eval_loss": None, "features": "x"}
    sent = {f"bytes_{way}": 1 for way in ("up", "up_fp32", "down", "down_fp32")}
    rows = [
        {**row, **sent, "run": run, "nodes": nodes, "fid": fid, "real": real, "samples": samples, "keys": keys}
        for run, nodes, fid, real, samples, keys in (
            ("pooled", 1, 2.0, [9, 3], 9, {}),
            ("centralized", 4, 4.0, [9, 3], 9, {"sample.steps": 25}),
            ("fewer", 4, 6.0, [8, 3], 9, {}),
            ("more", 4, 6.0, [9, 3], 99, {}),
            ("faster", 4, 6.0, [9, 3], 9, {"sample.steps": 9}),
        )
    ]
    lines = comparison_tables.markdown(rows).splitlines()
    assert [line.split("|")[4].strip() for line in lines[2:7]] == ["1.000", "2.000", "–", "–", "–"]


def test_fids_are_divided_by_each_run_on_all_images() -> None:
    row = {"condition": "", "kid": None, "coverage": None, "eval_loss": None, "features": "x", "samples": 9, "real": []}
    row["keys"] = {}
    sent = {f"bytes_{way}": 1 for way in ("up", "up_fp32", "down", "down_fp32")}
    runs = (("one", 1, 1.0), ("two", 1, 9.0), ("vanilla", 4, 5.0))
    rows = [{**row, **sent, "run": run, "nodes": nodes, "fid": fid} for run, nodes, fid in runs]
    heads, _, *lines = (line.split("|")[4:6] for line in comparison_tables.markdown(rows).splitlines()[:5])
    assert [head.strip() for head in heads] == ["over one", "over two"]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["1.000", "0.111"],
        ["9.000", "1.000"],
        ["5.000", "0.556"],
    ]


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(FILE)
    cell = comparison.cells(str(tmp_path / "x.toml"), QUICK, None, None)[0]

    def stopped(arguments: list[str]) -> int:
        in_process([*arguments, "-c", "num-server-rounds=1"])
        run = tmp_path / cell.name
        status = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(json.dumps({**status, "status": "stopped"}))
        return 130

    assert comparison.do(cell, tmp_path, stopped) == 130
    went_on: list[list[str]] = []
    comparison.do(cell, tmp_path, lambda arguments: went_on.append(arguments) or 0)
    assert went_on[0][:3] == ["run", "local", "--resume"]


@pytest.mark.parametrize("name", [*comparison.PRESETS])
def test_presets_are_valid_and_say_so_where_a_file_is_not(name: str) -> None:
    cells = comparison.cells(name, {}, 10, 3)
    assert {c.seed for c in cells} == {0, 1, 2}
    assert len({c.name for c in cells}) == sum(not c.shared for c in cells)
    assert {c.run for c in cells if c.shared} <= {*comparison.POOLED}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "runs and conditions tables of tables, with one run at least"),
        ("[run.x]", "'run' is not allowed: must be num-supernodes, seeds, common, runs or conditions"),
        (
            "[runs.x]\nstrategie = 'feddm-lean'",
            "run 'x': strategie = 'feddm-lean': no such key; did you mean strategy?",
        ),
        ("seeds = 3\n[runs.x]", "seeds = 3 is not allowed: must be a list of integers"),
        ("[runs.x", "cannot be read"),
        ("[runs.x]\ncentralized = 'no'", "run 'x': centralized = 'no' is not allowed: must be true or false"),
        ("[runs.x]\nresume = true", "run 'x': resume is not allowed: the comparison decides it"),
        ("common = { seed = 5 }\n[runs.x]", "run 'x': seed is not allowed: the comparison decides it (--seeds"),
        (
            "[runs.x]\n[conditions.'.1']",
            "run 'x': run-name = '.1-x-seed-0' is not allowed: must be at most 128 letters",
        ),
        ("[runs.x]\n[conditions.even]\ndata.alpha = 100.0", "run 'x': data.alpha = 100.0 with data.partition = 'iid'"),
        ("num-supernodes = 0\n[runs.x]", "num-supernodes = 0 is not allowed: must be an integer at least 1"),
        (
            "[runs.'a b']\n[runs.'a-b']\nstrategy = 'feddm-lean'",
            "two of its runs would have the same name, 'a-b-seed-0'",
        ),
    ],
)
def test_a_wrong_file_is_named(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.toml").write_text(text)
    assert cli.main(["compare", str(tmp_path / "x.toml"), "-o", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "keys", "said"),
    [
        ("non-iid", {"data.alpha": 0.1}, "data.alpha = 0.1: the condition 'dirichlet 0.3' of non-iid sets it"),
        ("codecs", {"strategy": "feddm-quant"}, "strategy = 'feddm-quant': the run 'quant' of codecs sets it"),
        ("paper", {"seed": 7}, "run 'centralized': seed is not allowed: the comparison decides it"),
    ],
)
def test_what_tells_the_runs_apart_cannot_be_overridden(preset: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        comparison.cells(preset, keys, None, None)


@pytest.mark.parametrize("kept", [None, "", '{"nodes": 4'])
def test_a_run_of_unknown_keys_is_nobodys_result(kept: str | None, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(FILE)
    cell = comparison.cells(str(tmp_path / "x.toml"), QUICK, None, None)[0]
    (tmp_path / cell.name).mkdir()
    if kept is not None:
        (tmp_path / f"{cell.name}.json").write_text(kept)
    with pytest.raises(ConfigError, match=rf"{cell.name}.json, the keys that it was run with, is missing or damaged"):
        comparison.do(cell, tmp_path, lambda arguments: 0)


def test_one_node_has_nothing_to_leave_out() -> None:
    cells = comparison.cells("paper", {"server.aggregation": "median"}, 4, 1)
    rules = {cell.run: cell.keys.get("server.aggregation") for cell in cells}
    assert rules == {name: None if name in comparison.POOLED else "median" for name in rules}


def test_means_are_over_seeds() -> None:
    one: dict[str, Any] = {"condition": "iid", "run": "vanilla", "kid": 0.01, "coverage": 0.9, "eval_loss": 0.1}
    one |= {
        "nodes": 4,
        "samples": 2000,
        "features": "x",
        "keys": {},
        **{f"bytes_{w}{f}": 10**6 for w in ("up", "down") for f in ("", "_fp32")},
    }
    text = comparison_tables.markdown([one | {"fid": 2.0, "seed": 0}, one | {"fid": 4.0, "seed": 1}])
    assert "| vanilla | 3 ± 1.414 | 2 | – | 0.01 ± 0 | 0.9 ± 0 |" in text
    assert "| 1 MB (1x) | 1 MB (1x) | 0.00011 | 2 |" in text  # 4 Mbit of each of four nodes
    pooled = one | {"run": "centralized", "nodes": 1, "fid": 1.5, "seed": 0}
    for keys, over in (({}, "2.000"), ({"data.image-size": 14}, "–")):
        text = comparison_tables.markdown([one | {"fid": 3.0, "seed": 0}, pooled | {"keys": keys}])
        assert f"| vanilla | 3 | 3 | {over} |" in text
