"""A node's part in a secure sum: its keys, the shares of its secrets, its masks, and what it tells of others' secrets.

What it must not forget between messages, or do twice, is in a file that only its owner can read,
<state-path>/<run-uuid>/<node>/secure.json. It is written, durably, before the answer leaves.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from filelock import FileLock

from feddm_flwr.config import LEAST_OF_SUM, ConfigError, RunConfig, least_replies, nodes_asked
from feddm_flwr.exchange.node_state import NodeState
from feddm_flwr.node.settings import NodeConfig, node_state_root
from feddm_flwr.privacy.secure_sum import (
    SECRET,
    Public,
    SecureSumError,
    Words,
    add_pairwise_masks,
    check_signature,
    context,
    new_key,
    own_mask,
    public_key,
    seal,
    sign,
    split,
    threshold,
    unseal,
)
from feddm_flwr.protocol.tasks import KEYS, SHARES, SecureTask, TrainTask
from feddm_flwr.storage.atomic import whole_file

_REMEMBERED = 100  # rounds whose sums were opened
_OPENED = "opened"


@dataclass(frozen=True)
class Identity:
    """A node's own key, and those of the others, by name."""

    key: ec.EllipticCurvePrivateKey
    others: dict[str, ec.EllipticCurvePublicKey]


def identity(own: NodeConfig, name: str) -> Identity | None:
    """Returns what the node config's `secure-key` and `secure-peers` name; None in a simulation, whose nodes are one
    machine's.

    Raises:
        ConfigError: they are missing, cannot be read, or do not go together.
    """
    if "node-name" not in own and not {"secure-key", "secure-peers"} & {*own}:
        return None
    paths = {}
    for setting, what in (("secure-key", "this node's private key"), ("secure-peers", "the nodes' public keys")):
        if not isinstance(path := own.get(setting), str) or not path:
            raise ConfigError(
                f"{setting} is missing in the --node-config: privacy.secure-aggregation needs the file with {what}, "
                "which feddm certs writes"
            )
        paths[setting] = Path(path).expanduser()
    try:
        key = load_ssh_private_key(paths["secure-key"].read_bytes(), None)
        others = dict(_peers(paths["secure-peers"].read_text()))
    except (OSError, ValueError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"secure-key, secure-peers in the --node-config cannot be read: {why}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("secure-key in the --node-config is not allowed: must be an elliptic-curve key")
    if name not in others or others[name] != key.public_key():
        raise ConfigError(f"secure-peers in the --node-config has not the public key of this node, {name}")
    return Identity(key, others)


def _peers(text: str) -> Iterator[tuple[str, ec.EllipticCurvePublicKey]]:
    for line in filter(None, map(str.strip, text.splitlines())):
        key, _, name = line.rpartition(" ")
        found = load_ssh_public_key(key.encode())
        if not isinstance(found, ec.EllipticCurvePublicKey):
            raise ValueError(f"the key of {name} is not an elliptic-curve key")
        yield name, found


class SecureNode:
    """A node in the sums of a run."""

    def __init__(self, config: RunConfig, own: NodeConfig, name: str, run: str) -> None:
        """Is node `name` in the run with that uuid.

        Raises:
            ConfigError: as `identity`.
            ValueError, OSError: as `NodeState`.
        """
        self._config, self._name, self._identity = config, name, identity(own, name)
        private = config.privacy.of_images
        self._path = NodeState(node_state_root(own), run, name, private=private).path / "secure.json"

    def answer(self, task: SecureTask) -> dict[str, Any]:
        """Returns the answer to a question about a sum.

        Raises:
            SecureSumError: it is out of turn, or what is said in it is wrong.
        """
        said = json.loads(task.content)
        with self._memory() as memory:
            if task.stage == KEYS:
                return self._keys(memory, task)
            session = _session(memory, task.session)
            return self._share(session, said) if task.stage == SHARES else self._open(memory, session, said)

    def mask(self, words: Words, task: TrainTask, images: int, about: Mapping[str, Any]) -> None:
        """Adds this node's masks to its words, in place, once for a session; `about` is what the training went by.

        Raises:
            SecureSumError: the session is another, was used, or its participants are not those that it began with.
        """
        said = json.loads(task.secure)
        with self._memory() as memory:
            session = _session(memory, said["session"])
            if session["stage"] != SHARES:
                raise SecureSumError("this session's masks were used before, or are not there yet")
            names, sealed = said["names"], said["sealed"]
            nodes = {name: session["nodes"][name] for name in names if name in session["nodes"]}
            others = {*names} - {self._name}
            if len(nodes) < len(names) or self._name not in nodes or {*sealed} != others:
                raise SecureSumError("nodes that this session did not begin with")
            self._check_count(len(names), self._needed(session))
            if _training(task) != session["training"]:
                raise SecureSumError(f"a session of round {session['training']}")
            if said["images"].get(self._name) != images or {*said["images"]} != {*names}:
                raise SecureSumError("numbers of images that are not those of the nodes")
            facts = {"session": said["session"], "nodes": nodes, "images": said["images"], **about}
            shares = {name: self._unsealed(session, name, sealed[name]).hex() for name in sorted(others)}
            session |= {"stage": "masked", "shares": shares | {self._name: session.pop("kept")}}
            mask = context(facts)
            publics = {name: bytes.fromhex(nodes[name]["masking"]) for name in others}
            words += own_mask(bytes.fromhex(session["own"]), mask, len(words))
            add_pairwise_masks(words, self._name, bytes.fromhex(session["masking"]), publics, mask)

    def _keys(self, memory: dict[str, Any], task: SecureTask) -> dict[str, Any]:
        last = max((int(training.partition("/")[0]) for training in memory[_OPENED]), default=0)
        if task.round <= last - _REMEMBERED:
            raise SecureSumError(f"round {task.round} is long over")
        session = memory["session"]
        if session.get("id") != task.session:
            session = memory["session"] = {
                "id": task.session,
                "stage": KEYS,
                "sealing": new_key().hex(),
                "masking": new_key().hex(),
                "own": new_key().hex(),
                "training": _training(task),
            }
        public = Public(*(public_key(bytes.fromhex(session[kind])) for kind in ("sealing", "masking")))
        signature = sign(self._identity.key, public.signed(task.session, self._name)) if self._identity else b""
        return {
            "sealing": public.sealing.hex(),
            "masking": public.masking.hex(),
            "signature": signature.hex(),
            _OPENED: memory[_OPENED].get(_training(task), []),
        }

    def _share(self, session: dict[str, Any], nodes: dict[str, dict[str, str]]) -> dict[str, Any]:
        """Returns the shares of this node's two secrets, sealed for each of the other nodes."""
        if session["stage"] == SHARES and session["nodes"] == nodes:  # it is asked again
            found: dict[str, Any] = session["sent"]
            return found
        if session["stage"] != KEYS:
            raise SecureSumError("this session's shares are given away")
        self._check_count(len(nodes))
        sealing, masking = (bytes.fromhex(session[kind]) for kind in ("sealing", "masking"))
        own = nodes.get(self._name, {})
        if (own.get("sealing"), own.get("masking")) != (public_key(sealing).hex(), public_key(masking).hex()):
            raise SecureSumError("this node's own keys were changed on their way")
        for name, said in nodes.items():
            public = Public(*(bytes.fromhex(said[kind]) for kind in ("sealing", "masking", "signature")))
            if self._identity:
                if name not in self._identity.others:
                    raise SecureSumError(f"{name} is not among this node's secure-peers")
                try:
                    check_signature(self._identity.others[name], public.signature, public.signed(session["id"], name))
                except SecureSumError as error:
                    raise SecureSumError(f"the key that is said to be {name}'s: {error}") from None
        session["nodes"] = nodes
        needed = self._needed(session)
        of_own = split(bytes.fromhex(session["own"]), [*nodes], needed)
        of_masking = split(masking, [*nodes], needed)
        both = {name: of_own[name] + of_masking[name] for name in nodes}
        sent = {
            name: _text(seal(sealing, bytes.fromhex(said["sealing"]), session["id"], self._name, name, both[name]))
            for name, said in nodes.items()
            if name != self._name
        }
        session |= {"stage": SHARES, "kept": both[self._name].hex(), "sent": sent}
        return sent

    def _open(self, memory: dict[str, Any], session: dict[str, Any], survivors: list[str]) -> dict[str, Any]:
        """Returns this node's shares of the own masks of those who are in the sum, and of the keys of the others."""
        if session["stage"] == _OPENED and session["survivors"] == survivors:
            found: dict[str, Any] = session["told"]
            return found
        shares: dict[str, str] = session.get("shares", {})
        chosen = {*survivors}
        if session["stage"] != "masked" or not {self._name} <= chosen <= {*shares}:
            raise SecureSumError("this session is not at its end, or was opened for others")
        training = session["training"]
        before = memory[_OPENED].get(training)
        if before not in (None, sorted(chosen)):
            raise SecureSumError(f"the sum of round {training} was opened with other nodes: {', '.join(before)}")
        if len(chosen) < (least := max(self._needed(session), LEAST_OF_SUM, self._config.min_replies)):
            raise SecureSumError(f"a sum of {len(chosen)} nodes; at least {least} are needed to open it")
        half = 2 * SECRET  # hex digits
        told = {name: share[:half] if name in chosen else share[half:] for name, share in shares.items()}
        rounds = memory[_OPENED] | {training: sorted(chosen)}
        memory[_OPENED] = dict([*rounds.items()][-_REMEMBERED:])
        memory["session"] = {"id": session["id"], "stage": _OPENED, "survivors": survivors, "told": told}
        return told

    def _unsealed(self, session: Mapping[str, Any], name: str, sealed: str) -> bytes:
        """Returns another's shares of its two secrets.

        Raises:
            SecureSumError: they are none.
        """
        private, public = (bytes.fromhex(key) for key in (session["sealing"], session["nodes"][name]["sealing"]))
        return unseal(private, public, session["id"], name, self._name, base64.b64decode(sealed))

    def _needed(self, session: Mapping[str, Any]) -> int:
        """Returns how many nodes open the sum of a session."""
        return threshold(len(session["nodes"]), self._config.privacy.threshold)

    def _check_count(self, count: int, least: int = LEAST_OF_SUM) -> None:
        """Finds out whether so many nodes are enough for a sum, by the run's own configuration, whatever the server
        says.

        Raises:
            SecureSumError: they are not.
        """
        asked = nodes_asked(self._config, self._config.min_nodes)
        least = max(least, LEAST_OF_SUM, least_replies(self._config, asked))
        if count < least:
            raise SecureSumError(f"a sum of {count} nodes; at least {least} are needed")

    @contextmanager
    def _memory(self) -> Iterator[dict[str, Any]]:
        """Yields what is remembered; changes are durable when the block ends without an error."""
        with FileLock(f"{self._path}.lock"):
            fresh: dict[str, Any] = {_OPENED: {}, "session": {}}
            memory = json.loads(self._path.read_text()) if self._path.exists() else fresh
            before = json.dumps(memory)
            yield memory
            if (after := json.dumps(memory)) != before:
                with whole_file(self._path, secret=True) as file:
                    file.write(after.encode())


def _session(memory: Mapping[str, Any], wanted: str) -> dict[str, Any]:
    found: dict[str, Any] = memory["session"]
    if found.get("id") != wanted:
        raise SecureSumError("a session that this node knows nothing of")
    return found


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _training(task: TrainTask | SecureTask) -> str:
    """Returns what tells a round's training from that of other rounds, and from those that were drawn anew."""
    return f"{task.round}/{task.repeat}"
