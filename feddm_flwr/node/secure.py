"""A node's part in a secure sum: its keys, the shares of its secrets, its masks, and what it tells of others' secrets.

What it must not forget between messages, or do twice, is in a file that only its owner can read,
<state-path>/<run-uuid>/<node>/secure.json. It is written, durably, before the answer leaves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from filelock import FileLock

from feddm_flwr.config import LEAST_OF_SUM, ConfigError, RunConfig, nodes_asked
from feddm_flwr.node.settings import NodeConfig, node_state_root
from feddm_flwr.privacy.secure_sum import (
    SECRET,
    Public,
    SecureSumError,
    add_pairwise_masks,
    check_key,
    check_signature,
    context,
    from_hex,
    is_tag,
    new_key,
    own_mask,
    public_key,
    seal,
    sign,
    split,
    tag,
    threshold,
    unseal,
)
from feddm_flwr.protocol.tasks import CONFIRM, KEYS, OPENED, REFUSED, SHARES, SecureTask, TrainTask
from feddm_flwr.storage.atomic import whole_file
from feddm_flwr.storage.state_folder import node_folder
from feddm_flwr.vector import Words

_REMEMBERED = 100  # rounds whose sums were opened


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
            ValueError, OSError: as `node_folder`.
        """
        self._config, self._name, self._run, self._identity = config, name, run, identity(own, name)
        self._path = node_folder(node_state_root(own), run, name) / "secure.json"

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
            if task.stage == SHARES:
                return self._share(session, said)
            return self._confirm(session, said) if task.stage == CONFIRM else self._open(memory, session, said)

    def images(self, task: TrainTask) -> object:
        """Returns how many images the server says that this node trains on."""
        return json.loads(task.secure)["images"].get(self._name)

    def opened(self, number: int) -> int:
        """Returns the number of a round if this node told of masks in it, else 0: what it kept in a round may be what
        the server made it to be, if the sum was of nobody else."""
        with self._memory() as memory:
            return number if number in map(_round, memory[OPENED]) else 0

    def check(self, task: TrainTask) -> dict[str, str]:
        """Returns the shares that the others gave this node, by name, with its own, before it trains for their sum.

        Raises:
            SecureSumError: the session is another, was used, or its nodes are not those that it began with.
        """
        with self._memory() as memory:
            return self._shares(memory, task)

    def mask(self, words: Words, task: TrainTask, about: Mapping[str, Any]) -> None:
        """Adds this node's masks to its words, in place, once for a session; `about` is what the training went by.

        Raises:
            SecureSumError: as `check`.
        """
        with self._memory() as memory:
            shares, session = self._shares(memory, task), memory["session"]
            nodes, images = session["nodes"], json.loads(task.secure)["images"]
            # What this node started with is its own, but a sum of it is told of once.
            trained = context({**about, "acked": [task.acked, task.acked_any]}).hex()
            if trained != memory[OPENED].get(session["training"], {}).get("trained", trained):
                raise SecureSumError(f"a sum of round {session['training']} was told of that was of other weights")
            mask = context({"session": session["id"], "nodes": nodes, "images": images, **about})
            session |= {"stage": "masked", "shares": shares, "trained": trained, "about": mask.hex()}
            publics = {name: bytes.fromhex(nodes[name]["masking"]) for name in shares if name != self._name}
            words += own_mask(bytes.fromhex(session["own"]), mask, len(words))
            add_pairwise_masks(words, self._name, bytes.fromhex(session["masking"]), publics, mask)

    def _keys(self, memory: dict[str, Any], task: SecureTask) -> dict[str, Any]:
        training, last = _training(task), max(map(_round, memory[OPENED]), default=0)
        if not (max(0, last - _REMEMBERED) < task.round <= self._config.num_server_rounds):
            raise SecureSumError(f"round {task.round} is over, or none of this run's")
        if not 0 <= task.repeat <= self._config.max_round_retries:
            raise SecureSumError(f"round {task.round} was repeated {task.repeat} times")
        session = memory["session"]
        if session.get("id") != task.session:
            session = memory["session"] = {
                "id": task.session,
                "stage": KEYS,
                "sealing": new_key().hex(),
                "masking": new_key().hex(),
                "own": new_key().hex(),
                "training": training,
            }
        public = Public(*(public_key(bytes.fromhex(session[kind])) for kind in ("sealing", "masking")))
        content = public.signed(self._signed(session), self._name)
        return {
            "sealing": public.sealing.hex(),
            "masking": public.masking.hex(),
            "signature": sign(self._identity.key, content).hex() if self._identity else "",
            OPENED: memory[OPENED].get(training, {}).get("names", []),
        }

    def _signed(self, session: Mapping[str, Any]) -> str:
        """Returns what a signature is about, beside keys."""
        return f"{self._run} {session['training']} {session['id']}"

    def _share(self, session: dict[str, Any], nodes: dict[str, dict[str, str]]) -> dict[str, Any]:
        """Returns the shares of this node's two secrets, sealed for each of the other nodes; or whom it refuses."""
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
        refused = {name: why for name, said in nodes.items() if (why := self._wrong_with(session, name, said))}
        if refused:
            return {REFUSED: refused}
        needed = threshold(len(nodes), self._config.privacy.threshold)
        of_own = split(bytes.fromhex(session["own"]), [*nodes], needed)
        of_masking = split(masking, [*nodes], needed)
        both, about = {name: of_own[name] + of_masking[name] for name in nodes}, _about(session["id"], nodes)
        sent = {
            name: seal(sealing, bytes.fromhex(said["sealing"]), about, self._name, name, both[name]).hex()
            for name, said in nodes.items()
            if name != self._name
        }
        session |= {"stage": SHARES, "nodes": nodes, "kept": both[self._name].hex(), "sent": sent}
        return sent

    def _wrong_with(self, session: Mapping[str, Any], name: str, said: Mapping[str, str]) -> str:
        """Returns what is wrong with the keys that are said to be a node's; "" if nothing is."""
        try:
            public = Public(*(bytes.fromhex(said[kind]) for kind in ("sealing", "masking", "signature")))
            check_key(bytes.fromhex(session["sealing"]), public.sealing)
            check_key(bytes.fromhex(session["masking"]), public.masking)
            if self._identity and name not in self._identity.others:
                return "it is not among this node's secure-peers"
            if self._identity:
                content = public.signed(self._signed(session), name)
                check_signature(self._identity.others[name], public.signature, content)
        except (SecureSumError, ValueError, KeyError, TypeError) as error:
            return str(error)
        return ""

    def _shares(self, memory: Mapping[str, Any], task: TrainTask) -> dict[str, str]:
        said = json.loads(task.secure)
        session = _session(memory, said["session"])
        if session["stage"] != SHARES:
            raise SecureSumError("this session's masks were used before, or are not there yet")
        if _training(task) != session["training"]:
            raise SecureSumError(f"a session of round {session['training']}")
        nodes, names, sealed = session["nodes"], [*said["images"]], said["sealed"]
        if not {self._name} <= {*names} <= {*nodes} or {*sealed} != {*names} - {self._name}:
            raise SecureSumError("nodes that this session did not begin with")
        if sorted(names) != memory[OPENED].get(session["training"], {}).get("names", sorted(names)):
            raise SecureSumError(f"a sum of round {session['training']} was told of that was of other nodes")
        self._check_count(len(names), self._needed(session))
        private, about = bytes.fromhex(session["sealing"]), _about(session["id"], nodes)
        shares = {self._name: str(session["kept"])}
        for name in sorted(sealed):
            public = bytes.fromhex(nodes[name]["sealing"])
            shares[name] = unseal(private, public, about, name, self._name, from_hex(sealed[name])).hex()
        return shares

    def _confirm(self, session: dict[str, Any], survivors: list[str]) -> dict[str, Any]:
        """Returns tags by which the others know that this node was told the same: what was asked, and who is left."""
        if session["stage"] == CONFIRM and session["survivors"] == survivors:
            found: dict[str, Any] = session["tags"]
            return found
        chosen = {*survivors}
        if session["stage"] != "masked" or not {self._name} <= chosen <= {*session["shares"]}:
            raise SecureSumError("this session is not at its end, or is told of to others")
        self._check_count(len(chosen), self._needed(session))
        private, content = bytes.fromhex(session["sealing"]), self._agreed(session, survivors)
        tags = {
            name: tag(private, bytes.fromhex(session["nodes"][name]["sealing"]), self._name, name, content).hex()
            for name in sorted(chosen - {self._name})
        }
        session |= {"stage": CONFIRM, "survivors": survivors, "tags": tags}
        return tags

    def _open(self, memory: dict[str, Any], session: dict[str, Any], tags: dict[str, str]) -> dict[str, Any]:
        """Returns this node's shares of the own masks of those who are in the sum, and of the keys of the others, once
        enough of those show that they were told the same (Bonawitz et al. 2017, the consistency check)."""
        if session["stage"] == OPENED:  # it is asked again
            found: dict[str, Any] = session["told"]
            return found
        if session["stage"] != CONFIRM:
            raise SecureSumError("this session is not at its end")
        survivors, shares, training = session["survivors"], session["shares"], session["training"]
        private, content = bytes.fromhex(session["sealing"]), self._agreed(session, survivors)
        publics = {name: bytes.fromhex(session["nodes"][name]["sealing"]) for name in {*survivors} - {self._name}}
        agreeing = 1 + sum(
            is_tag(from_hex(tags.get(name)), private, public, name, self._name, content)
            for name, public in publics.items()
        )
        if agreeing < (needed := self._needed(session)):
            raise SecureSumError(f"{agreeing} nodes were told the same; at least {needed} are needed")
        half = 2 * SECRET  # hex digits
        told = {name: share[:half] if name in survivors else share[half:] for name, share in shares.items()}
        last = max(_round(training), *map(_round, memory[OPENED]), 0)
        memory[OPENED] = {
            **{old: found for old, found in memory[OPENED].items() if _round(old) > last - _REMEMBERED},
            training: {"names": sorted(survivors), "trained": session["trained"]},
        }
        memory["session"] = {"id": session["id"], "stage": OPENED, "told": told}
        return told

    def _agreed(self, session: Mapping[str, Any], survivors: list[str]) -> bytes:
        """Returns what nodes must agree on before masks are told of."""
        return json.dumps([session["about"], sorted(survivors)]).encode()

    def _needed(self, session: Mapping[str, Any]) -> int:
        """Returns how many nodes open the sum of a session."""
        return threshold(len(session["nodes"]), self._config.privacy.threshold)

    def _check_count(self, count: int, least: int = 0) -> None:
        """Finds out whether so many nodes are enough for a sum, by the run's own configuration, whatever the server
        says.

        Raises:
            SecureSumError: they are not.
        """
        half = nodes_asked(self._config, self._config.min_nodes) // 2 + 1
        least = max(least, LEAST_OF_SUM, half, self._config.min_replies)
        if count < least:
            raise SecureSumError(f"a sum of {count} nodes; at least {least} are needed")

    @contextmanager
    def _memory(self) -> Iterator[dict[str, Any]]:
        """Yields what is remembered; changes are durable when the block ends without an error."""
        with FileLock(f"{self._path}.lock"):
            fresh: dict[str, Any] = {OPENED: {}, "session": {}}
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


def _training(task: TrainTask | SecureTask) -> str:
    """Returns what tells a round's training from that of other rounds, and from those that were drawn anew."""
    return f"{task.round}/{task.repeat}"


def _round(training: str) -> int:
    return int(training.partition("/")[0])


def _about(session: str, nodes: Mapping[str, Any]) -> str:
    """Returns what shares are sealed for: a node that was shown other nodes, or other keys of theirs, cannot read
    them."""
    return f"{session} {context(nodes).hex()}"
