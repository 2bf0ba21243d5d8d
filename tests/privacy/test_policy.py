"""A site's policy holds for every run, and says by name what a run asks too much of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from local_grid import config, node, nodes, run

from feddm_flwr.config import KEYS, ConfigError
from feddm_flwr.privacy.policy import Policy
from feddm_flwr.protocol.failures import RunFailedError


def policy(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "keys", "why"),
    [
        ('[allow]\nstrategy = ["feddm-lean"]', {}, "strategy = 'feddm-vanilla': must be 'feddm-lean'"),
        ('[allow]\nprivacy.mechanism = ["dp-sgd"]', {}, "privacy.mechanism = 'none': must be 'dp-sgd'"),
        ('[allow]\n"eval.audit" = [false]', {"eval.audit": True, "eval.features": "random"}, "eval.audit = True"),
        ("[allow.eval]\nfeatures = ['none']", {"eval.features": "random"}, "eval.features = 'random': must be 'none'"),
        ("[most]\nnum-server-rounds = 1", {}, "num-server-rounds = 2: must be at most 1"),
        ("[most]\nsteps = 1", {}, "steps = 2: must be at most 1"),
        ("[most]\nsteps = 2", {"train.local-steps": 0, "train.local-epochs": 9}, "steps = 1[0-9]+: must be at most 2"),
        ("[most]\nsteps = 5", {"finish.rounds": 1, "finish.local-steps": 6}, "steps = 6: must be at most 5"),
        ("[least]\neval.min-images = 200", {}, "eval.min-images = 100: must be at least 200"),
        (
            "[most]\nprivacy.epsilon = 8",
            {"privacy.mechanism": "dp-sgd", "privacy.noise-multiplier": 0.5},
            "privacy.epsilon = 0.0: must be at most 8",
        ),
        ("[most]\nmodel.lora-rank = 8", {}, "model.lora-rank = 0: must be at most 8"),
        ('[allow]\nmodel.block-channels = ["16,64"]', {}, "model.block-channels = '8': must be '16,64'"),
    ],
)
def test_a_run_that_asks_too_much_is_refused_by_key_value_and_rule(
    text: str, keys: dict[str, Any], why: str, tmp_path: Path
) -> None:
    rules = Policy(policy(tmp_path, text))
    with pytest.raises(ConfigError, match=rf"this site's policy: {why}.* \(policy.toml, \[\w+\]\)"):
        rules.check(config(**keys), 100)


def test_a_run_within_the_rules_is_not(tmp_path: Path) -> None:
    text = """
    [allow]
    strategy = ["feddm-vanilla", "feddm-lean"]
    privacy.figures = ["none"]
    [least]
    eval.min-images = 100
    [most]
    num-server-rounds = 2
    steps = 3
    """
    Policy(policy(tmp_path, text)).check(config(), 100)


def test_every_number_can_be_bounded_and_every_key_be_listed(tmp_path: Path) -> None:
    c = config()
    from feddm_flwr.config import flatten

    for key, value in flatten(c).items():
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        Policy(policy(tmp_path, f"[allow]\n{key} = [{shown}]")).check(c, 100)
        if KEYS[key].kind in (int, float) and value != 0 and key != "train.local-steps":
            Policy(policy(tmp_path, f"[least]\n{key} = {value}\n[most]\n{key} = {value}")).check(c, 100)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[most]\nrounds = 5", "rounds is not a key of a run"),
        ("[most]\nstrategy = 5", "strategy is no number"),
        ("[most]\nnum-server-rounds = '5'", "num-server-rounds = '5': must be a number"),
        ("[allow]\nstrategy = 'feddm-lean'", "strategy must have a list"),
        ("[allow]\nstrategy = []", "strategy must have a list"),
        ("[allow]\nstrategy = ['lean']", "strategy strategy = 'lean' is not allowed: must be feddm-vanilla"),
        ("[allow]\nsteps = [3]", r"steps is for \[least\] or \[most\]"),
        ("[forbid]\nstrategy = 5", r"\[forbid\] is not allowed: must be \[allow\], \[least\] or \[most\]"),
        ("num-server-rounds = 5", r"\[num-server-rounds\] is not allowed"),
        ("[most", "cannot be read"),
        ("[least]\nprivacy.noise-multiplier = 0.5", "may be 0 and say nothing: bound privacy.epsilon instead"),
        ("[most]\ntrain.local-steps = 5", "may be 0 and say nothing: bound steps instead"),
    ],
)
def test_a_policy_that_is_none_keeps_the_node_out(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        Policy(policy(tmp_path, text))


def test_nodes_hold_it_against_the_introduction_and_every_task(tmp_path: Path) -> None:
    path = policy(tmp_path, "[most]\nnum-server-rounds = 1")
    strict, fine = config(num_server_rounds=2), config(num_server_rounds=1)
    with pytest.raises(ConfigError, match="1 more: this site's policy: num-server-rounds = 2: must be at most 1"):
        run(strict, {i: node(strict, 1000 - i, policy=str(path)) for i in nodes(strict)})
    run(fine, {i: node(fine, 1000 - i, policy=str(path)) for i in nodes(fine)})

    def two_faced(i: int) -> Any:  # says one thing when it asks who is there, and another when it asks to train
        asks, trains = (node(c, 1000 - i, policy=str(path)) for c in (fine, strict))
        return lambda message: (asks if message.metadata.message_type == "query" else trains)(message)

    with pytest.raises(RunFailedError, match="this site's policy"):
        run(strict, {i: two_faced(i) for i in nodes(strict)})
    with pytest.raises(ConfigError, match=r"policy = .*nowhere.toml' in the --node-config cannot be read"):
        run(fine, {i: node(fine, 1000 - i, policy=str(tmp_path / "nowhere.toml")) for i in nodes(fine)})


def test_a_policy_that_is_empty_is_no_leave(tmp_path: Path) -> None:
    c = config()
    with pytest.raises(ConfigError, match="policy = '' in the --node-config is not allowed"):
        run(c, {i: node(c, 1000 - i, policy="") for i in nodes(c)})


def test_what_hangs_on_the_images_is_said_after_the_rest(tmp_path: Path) -> None:
    """A run that is refused is not told what a node finds of its images."""
    c = config(data__classes="0,1", model__class_conditional=True)
    path = policy(tmp_path, '[allow]\nprivacy.mechanism = ["dp-sgd"]')
    with pytest.raises(ConfigError) as refused:
        run(c, {i: node(c, 1000 - i, policy=str(path)) for i in nodes(c)})
    assert "privacy.mechanism = 'none'" in str(refused.value)
    assert "data.classes" not in str(refused.value)


def test_nothing_is_spent_on_a_run_that_is_refused(tmp_path: Path) -> None:
    c = config(privacy__mechanism="dp-sgd", privacy__noise_multiplier=1.0)
    path = policy(tmp_path, "[most]\nprivacy.epsilon = 8.0")
    with pytest.raises(ConfigError, match=r"privacy.epsilon = 0.0: must be at most 8"):
        run(c, {i: node(c, 1000 - i, policy=str(path)) for i in nodes(c)})
    assert not [*tmp_path.glob("xdg-state/feddm/privacy/*")]
