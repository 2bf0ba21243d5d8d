"""What a node's warm process tells the server; tests/deployment has the process itself."""

from __future__ import annotations

import pytest

from feddm_flwr import worker
from feddm_flwr.config import ConfigError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/home/doe/state/x"), "PermissionError: Permission denied"),
        (RuntimeError("cannot open /data/doe.png"), "RuntimeError; the node's own log says more"),
        (KeyError(), "KeyError; the node's own log says more"),
        (FloatingPointError("the training loss of north became nan"), "FloatingPointError: the training loss of north"),
        (ConfigError("data-path = '/data': no images"), "ConfigError: data-path = '/data': no images"),
    ],
)
def test_an_error_names_no_file(error: Exception, said: str) -> None:
    assert worker.told(error).startswith(said)
    assert "doe" not in worker.told(error)
