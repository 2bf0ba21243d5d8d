"""The codecs by name, and making one from the configuration."""

from __future__ import annotations

from dataclasses import fields

from feddm_flwr.codecs.base import Codec
from feddm_flwr.codecs.floating import BFloat16, Float16, Identity
from feddm_flwr.codecs.grid import Int2, Int3, Int4, Int8, Sign
from feddm_flwr.codecs.sparse import Budget, TopK
from feddm_flwr.config import CODECS

REGISTRY: dict[str, type[Codec]] = {
    codec.name: codec for codec in (Identity, Float16, BFloat16, Int8, Int4, Int3, Int2, Sign, TopK, Budget)
}


assert tuple(REGISTRY) == CODECS, "the configuration offers other codecs than there are"


def make(name: str, **options: int) -> Codec:
    """The codec of that name, with those of the options that it has."""
    kind = REGISTRY[name]
    return kind(**{field.name: options[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def options_of(codec: Codec) -> dict[str, int]:
    """The options of a codec, as `make` takes them."""
    return {field.name: getattr(codec, field.name) for field in fields(codec)}  # type: ignore[arg-type]
