"""The copy for Flower's Hub, by the checks that `flwr app publish` and `flwr build` make."""

from __future__ import annotations

import importlib
import io
import re
import runpy
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.supercore.fab_format_version import normalize_and_validate_fab_format

ROOT = Path(__file__).parent.parent
publish = importlib.import_module("flwr.cli.app_cmd.publish")  # by `from` it is the command
REPOSITORY = "https://example.org/owner/name"


@pytest.fixture
def hub() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "write_hub.py"))


def test_flower_takes_the_copy(hub: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / "feddm-flwr"
    hub["write"](copy, "account", REPOSITORY)
    config, _ = load_and_validate(copy / "pyproject.toml", check_module=False)
    publish._validate_app_name(copy.name, "Flower App directory name")
    publish._validate_description(config["project"]["description"])
    files = publish._collect_file_paths(copy)
    publish._validate_files(files)
    modules = {path.relative_to(ROOT) for path in (ROOT / "feddm_flwr").rglob("*.py")}
    others = {Path(name) for name in ("LICENSE", "README.md", "pyproject.toml")}
    assert {path.relative_to(copy) for path in files} == modules | others
    assert normalize_and_validate_fab_format(config).fab_format_version == 1
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(copy))) as bundle:
        assert {*bundle.namelist()} >= {str(path) for path in modules} | {"LICENSE"}


def test_its_readme_leads_to_the_repository(hub: dict[str, Any]) -> None:
    text = hub["readme"]("account", "feddm-flwr", REPOSITORY)
    _, front, body = text.split("---\n", 2)
    assert {"tags", "dataset", "framework"} == {*yaml.safe_load(front)}
    assert "make demo" not in body
    assert "flwr new @account/feddm-flwr" in body
    links = re.findall(r"\]\(([^)]+)\)", body)
    assert all(re.match(r"https?://|#", link) for link in links)
    for link in links:
        if (place := re.match(rf"{REPOSITORY}/(?:raw|blob)/main/([^#]+)", link)) is not None:
            assert (ROOT / place[1]).exists(), link


def test_a_copy_that_would_not_be_taken_is_refused(hub: dict[str, Any], tmp_path: Path) -> None:
    for folder, account, repository, said in (
        ("feddm_flwr", "account", REPOSITORY, 'DIR "feddm_flwr" is invalid'),
        ("feddm", "", REPOSITORY, "--publisher = ''"),
        ("feddm", "account", "", "--repository = ''"),
    ):
        with pytest.raises(ValueError, match=said):
            hub["write"](tmp_path / folder, account, repository)
    assert not list(tmp_path.iterdir())
