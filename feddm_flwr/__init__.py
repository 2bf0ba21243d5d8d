"""FedDM on Flower: train diffusers U-Nets across sites that keep their images.

What extensions are made of is imported at its first use: `feddm_flwr.Codec`, `feddm_flwr.ServerOptimizer`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feddm_flwr.aggregation.server_optimizers import ServerOptimizer as ServerOptimizer
    from feddm_flwr.codecs.base import Codec as Codec

__version__ = "0.1.0"

_PUBLIC = {"Codec": "codecs.base", "ServerOptimizer": "aggregation.server_optimizers"}


def __getattr__(name: str) -> Any:
    """Returns a public name, imported now: most of them need torch (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
