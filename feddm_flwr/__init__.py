"""FedDM on Flower: train diffusers U-Nets across sites that keep their images.

What extensions are made of, such as `feddm_flwr.Codec`, is imported at its first use (see docs/extending.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feddm_flwr.aggregation.base import Aggregator as Aggregator
    from feddm_flwr.aggregation.server_optimizers import ServerOptimizer as ServerOptimizer
    from feddm_flwr.codecs.base import Codec as Codec
    from feddm_flwr.data.readers import Reader as Reader
    from feddm_flwr.data.source import Source as Source
    from feddm_flwr.reporting.trackers import Tracker as Tracker
    from feddm_flwr.training.objectives import Denoising as Denoising
    from feddm_flwr.training.objectives import Objective as Objective

__version__ = "0.1.0"

#: The public names, and the modules that have them.
_PUBLIC = {
    "Aggregator": "aggregation.base",
    "Codec": "codecs.base",
    "Denoising": "training.objectives",
    "Objective": "training.objectives",
    "Reader": "data.readers",
    "ServerOptimizer": "aggregation.server_optimizers",
    "Source": "data.source",
    "Tracker": "reporting.trackers",
}


def __getattr__(name: str) -> Any:
    """Returns a public name, imported now: most of them need torch (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
