"""The run configuration: every key, what `preset` stands for, and what contradicts what."""

from feddm_flwr.config.fields import ConfigError
from feddm_flwr.config.keys import Codec
from feddm_flwr.config.names import (
    CODECS,
    FLOW_SCHEDULERS,
    LEAST_OF_SUM,
    MOST_CLASS_TEXT,
    MOST_CLASSES,
    NODE_NAME,
    NOISE_LEVELS,
    PARTITION_OF,
    SCHEDULERS,
    SPARSE_CODECS,
    SUM,
    class_name,
    may_be_told,
)
from feddm_flwr.config.parsing import (
    defaults,
    derive_seed,
    expanded,
    flatten,
    least_replies,
    local_path,
    local_steps,
    nodes_asked,
    parse,
)
from feddm_flwr.config.run_config import KEYS, RunConfig

__all__ = [
    "CODECS",
    "FLOW_SCHEDULERS",
    "KEYS",
    "LEAST_OF_SUM",
    "MOST_CLASSES",
    "MOST_CLASS_TEXT",
    "NODE_NAME",
    "NOISE_LEVELS",
    "PARTITION_OF",
    "SCHEDULERS",
    "SPARSE_CODECS",
    "SUM",
    "Codec",
    "ConfigError",
    "RunConfig",
    "class_name",
    "defaults",
    "derive_seed",
    "expanded",
    "flatten",
    "least_replies",
    "local_path",
    "local_steps",
    "may_be_told",
    "nodes_asked",
    "parse",
]
