"""The house rules that a machine can check: who imports whom, what stays light, how long a file is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "feddm_flwr"
FILES = sorted(PACKAGE.glob("*.py"))

#: What each module may import of its siblings: only what stands below it.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "schema": set(),
    "diffusion": set(),
    "wire": set(),
    "aggregation": set(),
    "whole_file": set(),
    "checkpoint": {"whole_file"},
    "outliers": {"aggregation"},
    "robust": {"aggregation"},
    "trackers": {"schema"},
    "tracking": {"config", "trackers", "whole_file"},
    "report_page": set(),
    "presets": {"schema"},
    "keys": {"presets", "schema"},
    "contradictions": {"keys"},
    "config": {"contradictions", "keys", "presets", "schema"},
    "charts": {"tracking"},
    "comparison": {"config", "tracking", "whole_file"},
    "comparison_tables": {"keys"},
    "report": {"charts", "report_page", "tracking", "whole_file"},
    "packing": {"wire"},
    "grid_codec": {"packing"},
    "sparse_codec": {"grid_codec", "packing", "wire"},
    "codec": {"config", "grid_codec", "packing", "sparse_codec", "wire"},
    "array_cache": {"whole_file"},
    "images": {"config", "keys"},
    "sources": {"config", "images"},
    "partition": {"config", "sources"},
    "data": {"array_cache", "config", "images", "partition", "sources"},
    "perceptual": set(),
    "assets": {"config", "diffusion", "perceptual", "whole_file"},
    "architecture": {"assets", "config"},
    "class_pipeline": set(),
    "pipelines": {"architecture", "assets", "class_pipeline", "config", "diffusion"},
    "model": set(),
    "latents": {"array_cache", "assets", "data", "images", "recording"},
    "objectives": {"config", "data", "diffusion", "images", "latents", "perceptual", "precision"},
    "costs": {"config", "exchange", "parts"},
    "exchange": {"codec", "config", "wire"},
    "broadcast": {"config", "exchange"},
    "state_folder": {"whole_file"},
    "node_state": {"exchange", "state_folder", "whole_file"},
    "certificates": {"config", "whole_file"},
    "resume": {"config"},
    "parts": {"config", "exchange", "model"},
    "node_link": {"config", "exchange", "node_state", "parts"},
    "node_config": {"config", "data", "state_folder"},
    "node_round": {
        *("architecture", "assets", "config", "data", "latents", "model", "node_link", "node_state", "objectives"),
        *("parts", "perceptual", "pipelines", "training"),
    },
    "worker": {"config", "node_config", "node_evaluation", "node_round", "recording"},
    "precision": set(),
    "recording": set(),
    "step": {"config", "objectives", "recording"},
    "training": {"config", "model", "objectives", "recording", "step"},
    "evaluation": {"class_pipeline", "config", "images", "latents", "precision", "recording"},
    "features": {"array_cache", "assets", "config", "images"},
    "reference": set(),
    "gauges": set(),
    "scores": {"reference"},
    "finished": {*("config", "data", "evaluation", "features", "images", "pipelines", "scores", "state_folder")},
    "node_evaluation": {
        *("architecture", "assets", "config", "data", "exchange", "features", "model", "node_round", "objectives"),
        *("reference", "training"),
    },
    "drawing": {*("assets", "config", "evaluation", "exchange", "images", "latents", "model", "pipelines")},
    "judge": {
        *(
            "assets",
            "config",
            "data",
            "diffusion",
            "drawing",
            "evaluation",
            "exchange",
            "features",
            "gauges",
            "images",
            "messages",
        ),
        *("model", "node_evaluation", "node_report", "reference", "state_folder", "strategy", "whole_file"),
    },
    "survey": {"config", "data", "evaluation", "presets", "sources"},
    "messages": set(),
    "probes": {"messages"},
    "nodes": {"config", "messages", "probes"},
    "collection": {"messages", "probes"},
    "node_report": {"config", "messages"},
    "tally": {"aggregation", "collection", "config", "exchange", "node_report", "outliers"},
    "strategy": {
        *(
            "aggregation",
            "broadcast",
            "checkpoint",
            "collection",
            "config",
            "exchange",
            "messages",
            "node_report",
            "nodes",
            "outliers",
        ),
        *("parts", "probes", "robust", "tally"),
    },
    "display": {"config", "tracking"},
    "options": {"config"},
    "launch": {"config", "display", "tracking"},
}
TOP = {"server_app", "server_run", "client_app", "cli"}
FLWR = {
    "judge",
    "messages",
    "collection",
    "probes",
    "nodes",
    "strategy",
    "server_app",
    "server_run",
    "client_app",
    "cli",
}
CODING = {"packing", "grid_codec", "sparse_codec", "codec", "exchange", "node_link"}
MODELS = {
    "architecture",
    "assets",
    "class_pipeline",
    "diffusion",
    "latents",
    "model",
    "objectives",
    "perceptual",
    "pipelines",
}
ABOUT_TENSORS = (
    CODING
    | MODELS
    | {"precision", "recording", "step", "training", "evaluation", "features", "node_round", "scores"}
    | {
        *("drawing", "finished", "gauges", "judge", "node_evaluation", "reference"),
    }
)
#: No torch at all, not even inside a function.
NO_TORCH = {*ALLOWED} - ABOUT_TENSORS
#: Costly to import: only inside the functions that need them, outside the modules that are about them.
HEAVY = {"bitsandbytes", "torch", "diffusers", "datasets", "flwr_datasets", "matplotlib", "sklearn", "ray"}
MAY_BE_HEAVY = ABOUT_TENSORS | {"server_run"}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Names of the modules that a file imports; siblings as `feddm_flwr.x`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    found: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            assert node.module
            found |= {f"feddm_flwr.{a.name}" for a in node.names} if node.module == "feddm_flwr" else {node.module}
    return found


def siblings(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("feddm_flwr.")}
    return names - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_point_down_only(path: Path) -> None:
    if path.stem == "server_app":  # which Flower loads before it starts the nodes
        assert siblings(path) == {"server_run"}
        assert imports(path, top_level=True) == {"__future__", "flwr.app", "flwr.serverapp"}
    elif path.stem in TOP:
        assert not siblings(path) & TOP
    else:
        assert siblings(path) <= ALLOWED[path.stem]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_flwr_and_torch_stay_where_they_belong(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    if path.stem not in FLWR:
        assert "flwr" not in roots
    if path.stem in NO_TORCH:
        assert not roots & {"torch", "diffusers"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_heavy_libraries_are_imported_late(path: Path) -> None:
    if path.stem not in MAY_BE_HEAVY:
        assert not {name.split(".")[0] for name in imports(path, top_level=True)} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_is_one_idea(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
