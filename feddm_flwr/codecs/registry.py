"""The codecs by name, and making one from the configuration."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from feddm_flwr.codecs.base import Codec
from feddm_flwr.codecs.floating import BFloat16, Float16, Identity
from feddm_flwr.codecs.grid import Int2, Int3, Int4, Int8, Sign
from feddm_flwr.codecs.sparse import Budget, TopK
from feddm_flwr.config import CODECS, SPARSE_CODECS, ConfigError, RunConfig
from feddm_flwr.config.plugins import is_plugin, load_class
from feddm_flwr.config.validation import about_sparse_codecs

REGISTRY: dict[str, type[Codec]] = {
    codec.name: codec for codec in (Identity, Float16, BFloat16, Int8, Int4, Int3, Int2, Sign, TopK, Budget)
}


assert tuple(REGISTRY) == CODECS, "the configuration offers other codecs than there are"
assert {name for name, codec in REGISTRY.items() if codec.sparse} == SPARSE_CODECS


def codec_class(name: str, key: str = "codec") -> type[Codec]:
    """Returns the codec of that name, which may be an extension's (see `config.plugins`).

    Raises:
        ConfigError: the extension is no codec.
    """
    if not is_plugin(name):
        return REGISTRY[name]
    found = load_class(key, name, Codec)  # type: ignore[type-abstract]
    if not is_dataclass(found) or not isinstance(getattr(found, "name", None), str):
        raise ConfigError(f"{key} = {name!r}: must be a frozen dataclass with a class attribute `name`")
    if found.name in REGISTRY:
        raise ConfigError(f"{key} = {name!r}: its name {found.name!r} is a built-in codec's; choose another")
    if unknown := {field.name for field in fields(found)} - {*OPTIONS}:
        raise ConfigError(f"{key} = {name!r}: has the option {sorted(unknown)[0]!r}; there are {', '.join(OPTIONS)}")
    return found


#: Options that a codec may have as fields, and how the configuration says them.
OPTIONS = ("block_size", "clip_search", "stochastic", "per_million", "bits", "ratio")


def check(config: RunConfig) -> None:
    """Checks the codecs of a run that are extensions, as `config.validation` checks the built-in ones.

    Raises:
        ConfigError: one is no codec, or cannot do what is asked of it.
    """
    names = {"codec.uplink": config.codec.uplink, "codec.downlink": config.codec.downlink}
    sparse = {name for key, name in names.items() if is_plugin(name) and codec_class(name, key).sparse}
    if problems := [*about_sparse_codecs(config, sparse)]:
        raise ConfigError("\n".join(problems))


def make(name: str, **options: int) -> Codec:
    """Returns the codec of that name, with those of the options that it has."""
    kind = codec_class(name)
    return kind(**{field.name: options[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def options_of(codec: Codec) -> dict[str, int]:
    """Returns the options of a codec, as `make` takes them."""
    return {field.name: getattr(codec, field.name) for field in fields(codec)}  # type: ignore[arg-type]
