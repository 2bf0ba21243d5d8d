"""Who a node is and what it holds, from its node config: its name, its images, its state folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from feddm_flwr.config import NODE_NAME, ConfigError, RunConfig
from feddm_flwr.data.node_data import NodeData, load_node
from feddm_flwr.storage.state_folder import check_writable, state_root

#: As Flower hands it over.
NodeConfig = Mapping[str, object]


def node_name(own: NodeConfig) -> str:
    """Returns `node-name`, else `node-<partition-id>`: Flower's own ids are random.

    Raises:
        ConfigError: the node config has neither, or the name has characters that a name may not have.
    """
    name = str(own.get("node-name", f"node-{own['partition-id']}" if "partition-id" in own else ""))
    if re.fullmatch(NODE_NAME, name):
        return name
    if name:
        raise ConfigError(f"node-name = {name!r} is not allowed: must be 1 to 64 letters, digits, '.', '_' or '-'")
    raise ConfigError("node-name is missing: start the SuperNode with --node-config 'node-name=\"site-a\" …'")


def node_data(config: RunConfig, own: NodeConfig) -> NodeData:
    """Returns the node's images: all below `data-path`, or its partition.

    Raises:
        ConfigError: as `data.load_node`.
    """
    partition = None
    if "partition-id" in own and "num-partitions" in own:
        partition = (int(str(own["partition-id"])), int(str(own["num-partitions"])))
    path = own.get("data-path")
    return load_node(config.data, config.seed, partition, str(path) if path is not None else None, node_state_root(own))


def node_state_root(own: NodeConfig) -> Path:
    """Returns `state-path`, else a folder of the user's."""
    path = own.get("state-path")
    return state_root(str(path) if path is not None else None)


def wants_worker(own: NodeConfig) -> bool:
    """Tells whether the node keeps a warm process between messages (see `node.worker`): its `worker`.

    Raises:
        ConfigError: it is neither true nor false.
    """
    wanted = own.get("worker", True)
    if not isinstance(wanted, bool):
        raise ConfigError(f"worker = {wanted!r} in the --node-config is not allowed: must be true or false")
    return wanted


def check_state(own: NodeConfig) -> None:
    """Tells whether the node can keep files.

    Raises:
        ConfigError: it cannot.
    """
    root = node_state_root(own)
    try:
        check_writable(root)
    except OSError as error:
        raise ConfigError(
            f"state-path = {str(root)!r} cannot be written to ({error.strerror}); this run's codec needs it: set "
            "state-path in the --node-config to a folder of this node's own"
        ) from error
