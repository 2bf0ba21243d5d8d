"""Run-config keys as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from feddm_flwr.cli.arguments import run_config_keys
from feddm_flwr.config import ConfigError


def test_a_file_of_windows_is_read(tmp_path: Path) -> None:
    """hukkin/tomli #304: its editors begin a file with a byte order mark."""
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbfseed = 3\r\n[model]\r\npreset = 'tiny'\r\n")
    assert run_config_keys([str(tmp_path / "x.toml")]) == {"seed": 3, "model.preset": "tiny"}


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ('seed=3 strategy="feddm-lean" data.flip=true', {"seed": 3, "strategy": "feddm-lean", "data.flip": True}),
        ("data.flip=True", {"data.flip": True}),
        ("data.flip = FALSE  seed= 4", {"data.flip": False, "seed": 4}),
        ("train.learning-rate=.001", {"train.learning-rate": 0.001}),
        ("train.learning-rate=1e-3 data.white=4095", {"train.learning-rate": 0.001, "data.white": 4095}),
        ("data.black=-1024", {"data.black": -1024}),
        ("model.block-channels=[32, 64]", {"model.block-channels": "32,64"}),
        ("model.block-channels=32,64", {"model.block-channels": "32,64"}),
        ('data.classes=["a","b c"]', {"data.classes": "a,b c"}),
        ("data.name=“/data/my shirts”", {"data.name": "/data/my shirts"}),
        ("data.name=‘x’", {"data.name": "x"}),
        (r'data.name="C:\Users\x"', {"data.name": r"C:\Users\x"}),
        (r'data.name="C:\new\table"', {"data.name": r"C:\new\table"}),
        ("strategy=feddm-lean", {"strategy": "feddm-lean"}),
        ("data.name=\"a=b [c] 'd'\"", {"data.name": "a=b [c] 'd'"}),
        ("data.name='it\"s'", {"data.name": 'it"s'}),
        (r'data.name="say \"x\""', {"data.name": 'say "x"'}),
        ("run-name=2026-11-28", {"run-name": "2026-11-28"}),
        ('data.name=""', {"data.name": ""}),
    ],
)
def test_what_is_plainly_meant_is_taken(text: str, keys: dict[str, Any]) -> None:
    read = run_config_keys([text])
    assert read == keys
    assert [type(value) for value in read.values()] == [type(value) for value in keys.values()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not so from ''"),
        ("oops", "not so from 'oops'"),
        ("--seed=3", "not so from '--seed=3'"),
        ("seed:5", "not so from 'seed:5'"),
        ('strategy="feddm-lean', "not so from 'strategy="),
        ('seed=3,strategy="x"', "not so from 'seed=3,"),
        ("seed=1 seed=2", "seed is there twice"),
    ],
)
def test_what_is_not_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="--run-config ") as error:
        run_config_keys([text])
    assert said in str(error.value)


def test_files_and_texts_are_merged_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "my run.toml"
    file.write_text("seed = 1\n[model]\nblock-channels = [32, 64]\n[train]\nlocal-steps = 5\n")
    read = run_config_keys([str(file), "train.batch-size=8", "seed=2"])
    assert read == {"seed": 2, "model.block-channels": "32,64", "train.local-steps": 5, "train.batch-size": 8}
    file.write_text("seed = = 1")
    with pytest.raises(ConfigError, match=r"my run.toml' cannot be read: Invalid value \(at line 1"):
        run_config_keys([str(file)])
