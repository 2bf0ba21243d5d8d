"""The run configuration: complete, documented, typed, and clear about what is wrong."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feddm_flwr.config import KEYS, ConfigError, defaults, derive_seed, flatten, parse
from feddm_flwr.config.fields import PRESET
from feddm_flwr.config.presets import STRATEGIES
from feddm_flwr.reporting.records import nest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def error(**keys: Any) -> str:
    """What `parse` says of these keys, written with `_` for `-` and `__` for `.`."""
    with pytest.raises(ConfigError) as caught:
        parse({name.replace("__", ".").replace("_", "-"): value for name, value in keys.items()})
    return str(caught.value)


def test_pyproject_has_every_key_and_its_default() -> None:
    assert PYPROJECT["tool"]["flwr"]["app"]["config"] == nest(defaults())


def test_documentation_is_current() -> None:
    spec = importlib.util.spec_from_file_location("write_configuration", ROOT / "docs" / "write_configuration.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.text(), "run make docs"


def test_flower_installs_nothing_at_run_time() -> None:
    """Flower's `uv sync` resolves to nothing only if every dependency is excluded, extras included."""
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=~! ]", requirement)[0] for requirement in wanted}
    assert set(PYPROJECT["tool"]["uv"]["exclude-dependencies"]) == names


def test_every_dependency_has_a_tested_version() -> None:
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = {name.lower() for name in PYPROJECT["tool"]["uv"]["exclude-dependencies"]}
    assert names <= pinned


def test_defaults_are_valid_and_resolved() -> None:
    config = parse({})
    assert config == parse(defaults())
    assert PRESET not in flatten(config).values()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_are_presets(strategy: str) -> None:
    resolved = flatten(parse({"strategy": strategy}))
    assert {key: resolved[key] for key in STRATEGIES[strategy]} == STRATEGIES[strategy]


def test_the_user_wins_over_a_preset() -> None:
    config = parse({"strategy": "feddm-quant", "codec.downlink": "none", "server.learning-rate": 0.5})
    assert (config.codec.uplink, config.codec.downlink, config.server.learning_rate) == ("int8", "none", 0.5)


@given(
    st.sampled_from(sorted(STRATEGIES)),
    st.integers(1, 1000),
    st.floats(1e-6, 1, exclude_min=True),
    st.sampled_from(["iid", "dirichlet", "pathological", "shard"]),
    st.sampled_from(["tiny", "small"]),
    st.booleans(),
)
def test_resolved_configuration_resolves_to_itself(
    strategy: str, rounds: int, fraction: float, partition: str, preset: str, flip: bool
) -> None:
    config = parse(
        {
            "strategy": strategy,
            "num-server-rounds": rounds,
            "fraction-train": fraction,
            "data.partition": partition,
            "model.preset": preset,
            "data.flip": flip,
        }
    )
    assert parse(flatten(config)) == config


@given(st.sampled_from(sorted(KEYS)), st.one_of(st.text(), st.integers(), st.floats(), st.booleans()))
def test_any_value_is_accepted_or_refused_by_name(key: str, value: Any) -> None:
    try:
        config = parse({key: value})
    except ConfigError as refused:
        said = str(refused)
    else:
        assert parse(flatten(config)) == config
        return
    assert key in said


@given(st.sampled_from(sorted(k for k, spec in KEYS.items() if spec.kind is int)), st.floats(-1e6, 1e6))
def test_a_fraction_is_no_integer(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{key} = {value!r} is not allowed: must be an integer")):
        parse({key: value})


def test_unknown_keys_are_named_with_what_may_be_meant() -> None:
    assert error(train__learnig_rate=1.0) == "train.learnig-rate = 1.0: no such key; did you mean train.learning-rate?"


def test_every_problem_is_reported_at_once() -> None:
    said = error(num_server_rounds="two", train__batch_size=0.5, data__alpha=0.0, server__momentum=1.0).splitlines()
    assert said == [
        "num-server-rounds = 'two' is not allowed: must be an integer at least 1",
        "data.alpha = 0.0 is not allowed: must be a number above 0",
        "train.batch-size = 0.5 is not allowed: must be an integer at least 1",
        "server.momentum = 1.0 is not allowed: must be a number at least 0 and below 1, or preset",
    ]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"strategy": "fedavg"}, "strategy = 'fedavg' is not allowed: must be feddm-vanilla | feddm-prox"),
        ({"strategy": "feddm-prox", "train__mu": -0.1}, "train.mu = -0.1 is not allowed: must be a number at least 0"),
        ({"train__mu": 0.1}, "train.mu = 0.1 with strategy = 'feddm-vanilla': must be 0, or use feddm-prox"),
        ({"strategy": "feddm-prox", "train__mu": 0.0}, "must be above 0, or use feddm-vanilla"),
        ({"codec__uplink": "int8"}, "codec.uplink = 'int8'"),
        ({"strategy": "feddm-quant", "codec__uplink": "none", "codec__downlink": "none"}, "use feddm-vanilla"),
        ({"run_name": "../x"}, "run-name = '../x' is not allowed: must be at most 128 letters"),
        ({"data__image_size": 9}, "data.image-size = 9 is not divisible by 2"),
        ({"data__image_size": 28, "model__block_channels": "32,32,32,32"}, "not divisible by 8"),
        ({"model__block_channels": "32,30"}, "each must be a multiple of model.norm-groups = 8"),
        ({"model__block_channels": "32,x"}, 'must be integers such as "32,64,128"'),
        ({"model__attention": "0,2"}, "model.attention = '0,2' is not allowed"),
        ({"model__attention": "0"}, "for each of the 2 levels"),
        ({"model__attention": "0,0", "model__resnet_resampling": True}, "acts on levels with attention only"),
        ({"model__attention_head_dim": 40}, "must divide the 64 channels"),
        ({"model__block_channels": "32,48", "model__attention": "0,0"}, "must divide the 48 channels"),
        ({"train__local_epochs": 1}, "exactly one of them must be above 0"),
        ({"train__local_steps": 0}, "exactly one of them must be above 0"),
        ({"sample__steps": 2000}, "must be at most diffusion.timesteps = 1000"),
        (
            {"diffusion__schedule": "linear", "diffusion__timesteps": 100},
            "diffusion.timesteps = 100 with diffusion.schedule = 'linear': must be at least 500",
        ),
        ({"data__partition": "natural"}, "data.natural-column = ''"),
        ({"data__alpha": 0.05}, "data.alpha = 0.05 with data.partition = 'iid': acts with 'dirichlet' only"),
        ({"data__shards_per_node": 3, "data__partition": "dirichlet"}, "acts with 'shard' only"),
        (
            {"strategy": "feddm-lean", "codec__stochastic_rounding": True},
            "'int2' and codec.target = 'delta': must be false",
        ),
        (
            {"strategy": "feddm-quant", "codec__downlink": "sign", "codec__stochastic_rounding": True},
            "codec.stochastic-rounding = true with 'sign'",
        ),
        ({"codec__clip_search": True}, "codec.clip-search = true with codec.uplink = 'none', codec.downlink = 'none'"),
        ({"strategy": "feddm-lean", "codec__clip_search": True}, "'int2': acts with int8, int4 or int3 only"),
        ({"codec__block_size": 128}, "'none': acts with int8 to sign, topk and sum only"),
        (
            {"model__lora_targets": "to_q"},
            "with model.lora-rank = 0: acts with a rank above 0 only",
        ),
        ({"codec__budget_ratio": 200}, "codec.budget-ratio = 200 with codec.uplink = 'none', codec.downlink = 'none'"),
        ({"strategy": "feddm-lean", "codec__topk_share": 0.5}, "'int2': acts with 'topk' only"),
        ({"sample__guidance": 7.0}, "sample.guidance = 7.0 with model.class-conditional = false: acts with true only"),
        ({"server__momentum": 0.9}, "server.momentum = 0.9 with server.optimizer = 'averaging': must be 0"),
        ({"server__aggregation": "median", "min_replies": 2}, "least 3; of two replies none"),
        (
            {"server__aggregation": "median", "exchange__parts": "usplit"},
            "must be mean; of the few replies with a part",
        ),
        ({"server__trim_share": 0.1}, "with server.aggregation = 'mean': acts with 'trimmed-mean' only"),
        ({"diffusion__prediction": "epsilon"}, "with diffusion.schedule = 'cosine': its noisiest level magnifies"),
        ({"data__channels": 2}, "must be 1 (grey) or 3 (RGB)"),
        ({"data__name": "/some/folder"}, "data.image-size must be set for data.name = '/some/folder'"),
        ({"train__learning_rate": float("nan")}, "train.learning-rate = nan is not allowed"),
        ({"train__deterministic": 1}, "train.deterministic = 1 is not allowed: must be true or false"),
        ({"num_server_rounds": True}, "num-server-rounds = True is not allowed"),
    ],
)
def test_contradictions_name_key_value_and_way_out(keys: dict[str, Any], said: str) -> None:
    assert said in error(**keys)


def test_seeds_differ_by_every_part() -> None:
    seeds = {derive_seed(s, n, r) for s in range(5) for n in ("a", "b") for r in range(5)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_an_unknown_strategy_would_decide_is_not_asked_for() -> None:
    with pytest.raises(ConfigError) as error:
        parse({"strategy": "feddm-foo", "train.mu": 0.1})
    assert len(str(error.value).splitlines()) == 1
