"""Extensions in contrib/: named by run config, found before anything starts, refused where they are something else."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from local_grid import config, run

import feddm_flwr
from feddm_flwr import contrib
from feddm_flwr.config import ConfigError, parse
from feddm_flwr.contrib.yogi import yogi
from feddm_flwr.exchange.extensions import check_extensions

FLOAT8, YOGI = "feddm_flwr.contrib.fp8:Float8", "feddm_flwr.contrib.yogi:yogi"


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module in contrib/, `feddm_flwr.contrib.own`."""
    monkeypatch.setattr(contrib, "__path__", [*contrib.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "feddm_flwr.contrib.own", raising=False)
    return tmp_path / "own.py"


def test_a_run_with_a_codec_and_a_server_optimizer_of_contrib() -> None:
    keys = {"strategy": "feddm-quant", "codec__target": "delta", "num_server_rounds": 3}
    own = config(codec__uplink=FLOAT8, codec__downlink=FLOAT8, **keys)
    coded, whole = run(own), run(config(num_server_rounds=3))
    assert coded[-1].bytes_up_fp32 / coded[-1].bytes_up > 3.9
    assert coded[-1].train_loss == pytest.approx(whole[-1].train_loss, rel=0.02)
    assert run(own)[-1].weights.tobytes() == coded[-1].weights.tobytes()
    c = config(server__optimizer=YOGI, server__learning_rate=0.01, server__momentum=0.9)
    assert run(c)[-1].weights.tobytes() != run(config())[-1].weights.tobytes()


def test_yogi_is_that_of_the_paper() -> None:
    rule, random = yogi(0.1, 0.9), np.random.default_rng(0)
    w = random.standard_normal(50).astype(np.float32)
    state, m, v, expected = rule.init(w), np.zeros(50), np.full(50, 1e-6), w.astype(np.float64)
    for _ in range(5):
        delta = random.standard_normal(50).astype(np.float32)
        w, state = rule.update(w, delta, state)
        m = 0.9 * m + 0.1 * delta
        v = v - 0.01 * delta**2 * np.sign(v - delta**2)
        expected = expected + 0.1 * m / (np.sqrt(v) + 1e-3)
    np.testing.assert_allclose(w, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "name", "said"),
    [
        ("codec.uplink", "fp8:Float8", "an extension is written feddm_flwr.contrib.MODULE:NAME"),
        ("codec.uplink", "os:system", "an extension is written feddm_flwr.contrib.MODULE:NAME"),
        ("codec.uplink", "feddm_flwr.contrib.no:Codec", "there is no feddm_flwr/contrib/no.py"),
        ("codec.downlink", "feddm_flwr.contrib.fp8:Float9", r"has no class or function Float9; it has \['Float8'\]"),
        ("codec.uplink", "float8", r"must be none \| .* \| feddm_flwr.contrib.MODULE:NAME, or preset"),
        ("train.optimizer", FLOAT8, r"must be adamw \| adamw8bit"),
        ("server.optimizer", YOGI, "server.learning-rate must be set for server.optimizer = '"),
    ],
)
def test_what_is_not_there_is_refused_with_the_configuration(key: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse({"strategy": "feddm-quant", key: name})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class Own: ...", "must be a subclass of feddm_flwr.Codec"),
        ("from feddm_flwr import Codec\n\nclass Own(Codec): ...", "lacks decode, encode, init, limits"),
        ("import nothing_like_it\n\nclass Own: ...", "cannot be imported .ModuleNotFoundError"),
        ("class Own(", "own.py, line 1"),
        (
            "from feddm_flwr.contrib.fp8 import Float8\n\nclass Own(Float8):\n    name = 'int8'",
            "its name 'int8' is a built-in codec's",
        ),
        (
            "from feddm_flwr.contrib.fp8 import Float8\n\nclass Own(Float8):\n    name = 'few'\n    sparse = True",
            "codec.target = 'weights' with 'feddm_flwr.contrib.own:Own': most weights would become 0",
        ),
    ],
)
def test_what_is_no_codec_is_refused_before_anything_starts(text: str, said: str, extension: Path) -> None:
    extension.write_text(text)
    keys = {"strategy": "feddm-quant", "codec.target": "weights", "codec.uplink": "feddm_flwr.contrib.own:Own"}
    with pytest.raises(ConfigError, match=said):  # the one line or the other
        check_extensions(parse(keys))


def test_what_makes_no_server_optimizer_is_refused(extension: Path) -> None:
    keys = {"server.optimizer": "feddm_flwr.contrib.own:own", "server.learning-rate": 1.0, "server.momentum": 0.0}
    extension.write_text("def own(eta): ...")
    with pytest.raises(ConfigError, match="must be a function of a step size and a momentum"):
        check_extensions(parse(keys))
    extension.write_text("def own(eta, beta):\n    return 1.0")
    sys.modules.pop("feddm_flwr.contrib.own")
    with pytest.raises(ConfigError, match=r"must return a feddm_flwr.ServerOptimizer, not float"):
        check_extensions(parse(keys))


def test_public_names_are_those_of_the_rooms() -> None:
    from feddm_flwr.codecs.base import Codec

    assert feddm_flwr.Codec is Codec
    with pytest.raises(AttributeError, match="has no attribute 'Kodec'"):
        _ = feddm_flwr.Kodec  # type: ignore[attr-defined]
