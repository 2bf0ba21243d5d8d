"""Extensions in contrib/: named by run config, found before anything starts, refused where they are something else."""

from __future__ import annotations

import json
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from local_grid import config, node, run, run_server

import feddm_flwr
from feddm_flwr import contrib
from feddm_flwr.config import ConfigError, parse
from feddm_flwr.config.plugins import check_there, look_first_in
from feddm_flwr.contrib.huber import Huber
from feddm_flwr.contrib.yogi import yogi
from feddm_flwr.data.node_data import load_all, load_node
from feddm_flwr.extensions import check_extensions
from feddm_flwr.protocol.failures import RunFailedError

FLOAT8, YOGI = "feddm_flwr.contrib.fp8:Float8", "feddm_flwr.contrib.yogi:yogi"
HUBER, ARRAYS = "feddm_flwr.contrib.huber:Huber", "feddm_flwr.contrib.arrays:Arrays"


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module in contrib/, `feddm_flwr.contrib.own`."""
    monkeypatch.setattr(contrib, "__path__", [*contrib.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "feddm_flwr.contrib.own", raising=False)
    return tmp_path / "own.py"


def test_a_run_with_a_codec_and_a_server_optimizer_of_contrib() -> None:
    own = config(codec__uplink=FLOAT8, codec__downlink=FLOAT8, strategy="feddm-quant", codec__target="delta")
    coded, whole = run(own), run(config())
    assert coded[-1].bytes_up_fp32 / coded[-1].bytes_up > 3.9
    assert coded[-1].train_loss == pytest.approx(whole[-1].train_loss, rel=0.02)
    assert run(own)[-1].weights.tobytes() == coded[-1].weights.tobytes()
    c = config(server__optimizer=YOGI, server__learning_rate=0.01, server__momentum=0.9, num_server_rounds=1)
    assert run(c)[0].weights.tobytes() != whole[0].weights.tobytes()


def test_an_objective_of_contrib_is_minimized_and_held_out_losses_stay_comparable() -> None:
    plain, own = run(config(num_server_rounds=3)), run(config(num_server_rounds=3, train__objective=HUBER))
    assert own[0].eval_loss == plain[0].eval_loss  # of the same weights, the first ones
    assert own[2].eval_loss < own[1].eval_loss < own[0].eval_loss
    assert own[0].train_loss != plain[0].train_loss
    prediction, goal = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    huber = Huber.distance(object.__new__(Huber), prediction, goal)
    distance, c = (prediction - goal).flatten(1).norm(dim=1), 0.00054 * 8
    torch.testing.assert_close(huber, (distance**2 + c**2).sqrt() - c)


def test_a_reader_of_contrib_reads_what_nodes_have(tmp_path: Path) -> None:
    images, classes, _ = load_all(parse({}).data)
    for i in range(4):
        np.savez(tmp_path / f"{i}.npz", images=images[i::4, 0], labels=np.array([int(c) for c in classes[i::4]]))
    keys = {"data__name": "digits-as-arrays", "data__image_size": 8, "data__channels": 1, "data__reader": ARRAYS}
    c = config(data__classes=",".join(map(str, range(10))), train__local_steps=5, **keys)
    handlers = {i: node(c, i, **{"data-path": str(tmp_path / f"{i}.npz")}) for i in range(4)}
    done = run(c, handlers)
    assert done[-1].train_loss < done[0].train_loss
    data = load_node(c.data, 0, None, str(tmp_path / "0.npz"), tmp_path / "state")
    assert {image.tobytes() for image in (*data.train, *data.held_out)} == {image.tobytes() for image in images[0::4]}
    assert data.class_counts == {str(n): classes[0::4].count(str(n)) for n in range(10)}
    np.savez(tmp_path / "0.npz", images=images[:20, 0])  # as a site adds to its images
    assert len(load_node(replace(c.data, classes=""), 0, None, str(tmp_path / "0.npz"), tmp_path / "state").train) == 18
    (tmp_path / "0.npz").write_text("nothing")
    with pytest.raises(ConfigError, match=r"data-path = .*: must be an .npz file with images \(ValueError\)"):
        load_node(c.data, 0, None, str(tmp_path / "0.npz"), tmp_path / "state")


def test_an_aggregator_and_a_tracker_of_the_users_own(extension: Path, tmp_path: Path) -> None:
    extension.write_text(
        """
import json
import numpy as np
from feddm_flwr import Aggregator, Tracker

class Unweighted(Aggregator):
    def __init__(self, size):
        self._sum, self._count = np.zeros(size, np.int64), 0
    @property
    def count(self):
        return self._count
    def add(self, vector, weight, frame, scale):
        self._sum += np.rint(vector * 2.0**32).astype(np.int64)
        self._count += 1
    def mean(self):
        return (self._sum / (2.0**32 * max(1, self._count))).astype(np.float32)

class Notes(Tracker):
    def __init__(self, run, identity, config):
        self._file = run / "notes.jsonl"
    def log(self, figures, number):
        with self._file.open("a") as file:
            file.write(json.dumps([number, sorted(figures)]) + chr(10))
    def image(self, path, number): ...
    def finish(self, *, completed): ...
"""
    )
    own = "feddm_flwr.contrib.own"
    equal = {"data__partition": "iid", "num_server_rounds": 2, "data__eval_fraction": 0.0, "eval__every": 0}
    ours, mean = run(config(server__aggregation=f"{own}:Unweighted", **equal))[-1], run(config(**equal))[-1]
    # Nodes have 359 or 360 images.
    assert 0 < np.linalg.norm(ours.weights - mean.weights) < 1e-3 * np.linalg.norm(mean.weights)
    quick = {"sample__count": 1, "sample__steps": 1, "out_dir": str(tmp_path), "run_name": "x"}
    run_server(config(tracker=f"{own}:Notes", **quick))
    lines = [json.loads(line) for line in (tmp_path / "x" / "notes.jsonl").read_text().splitlines()]
    assert [number for number, _ in lines] == [1, 2]
    assert "train_loss" in lines[0][1]


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
        ("data.reader", "npz", r"must be auto \| feddm_flwr.contrib.MODULE:NAME"),
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


@pytest.mark.parametrize(
    ("key", "base"),
    [
        ("data.reader", "Reader"),
        ("server.aggregation", "Aggregator"),
        ("tracker", "Tracker"),
        ("train.objective", "Denoising"),
    ],
)
def test_each_key_takes_what_is_of_its_base(key: str, base: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = '{FLOAT8}': must be a subclass of feddm_flwr.{base}"):
        check_extensions(parse({key: FLOAT8}))


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


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return w + d, {'m': d}", None),
        ("return (w + d)[:2], s", r"update must return a float32 vector of the size it is given, not float32 \(2,\)"),
        ("return w.astype(float), s", "not float64"),
        ("return w, {'n': 1}", "the state must be a dictionary of vectors"),
        ("w += d; return w, s", "update must change none of what it is given"),
        ("return w * s['no'], s", r"KeyError: 'no' \(own.py, line 4\)"),
    ],
)
def test_a_server_optimizer_is_tried_on_a_few_numbers(body: str, said: str | None, extension: Path) -> None:
    extension.write_text(
        f"from feddm_flwr import ServerOptimizer\ndef own(eta, beta):\n    def update(w, d, s):\n        {body}\n"
        "    return ServerOptimizer(lambda w: {}, update)\n"
    )
    name = "feddm_flwr.contrib.own:own"
    c = parse({"server.optimizer": name, "server.learning-rate": 1.0, "server.momentum": 0.0})
    with pytest.raises(ConfigError, match=f"server.optimizer = '{name}': .*{said}") if said else nullcontext():
        check_extensions(c)


@pytest.mark.parametrize(
    ("add", "mean", "said"),
    [
        ("self.n += 1", "return np.ones(self.size, np.float32)", None),
        ("self.n += 1", "return np.zeros(3)", r"mean must return a float32 vector .*, not float64 \(3,\)"),
        ("self.n += 1", "return None", "mean must return a float32 vector of the size it is given, not NoneType"),
        ("...", "return np.ones(self.size, np.float32)", "count is 0 after three updates"),
        ("1 / 0", "...", r"ZeroDivisionError: division by zero \(own.py, line 6\)"),
    ],
)
def test_an_aggregator_is_tried_on_a_few_numbers(add: str, mean: str, said: str | None, extension: Path) -> None:
    extension.write_text(
        "import numpy as np\nfrom feddm_flwr import Aggregator\nclass Own(Aggregator):\n"
        f"    def __init__(self, size): self.n, self.size = 0, size\n    def add(self, v, w, f, s):\n        {add}\n"
        f"    def mean(self): {mean}\n    count = property(lambda self: self.n)\n"
    )
    name = "feddm_flwr.contrib.own:Own"
    with pytest.raises(ConfigError, match=f"server.aggregation = '{name}': .*{said}") if said else nullcontext():
        check_extensions(parse({"server.aggregation": name}))


def test_a_distance_is_one_of_each_image(extension: Path, caplog: pytest.LogCaptureFixture) -> None:
    extension.write_text(
        "from feddm_flwr import Denoising\nclass Own(Denoising):\n    def distance(self, p, g): return (p - g).sum()\n"
    )
    c = config(train__objective="feddm_flwr.contrib.own:Own", num_server_rounds=1)
    with pytest.raises(RunFailedError, match="0 of 4 nodes gave a good reply"):
        run(c)
    assert re.search(r"distance must return a number for each image, \(\d+,\), not \(\)", caplog.text)


def test_extensions_of_an_app_are_found_before_those_of_the_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrib, "__path__", [*contrib.__path__])
    before = [*contrib.__path__]
    look_first_in(Path(before[0]))
    look_first_in(tmp_path / "none")
    assert contrib.__path__ == before
    (tmp_path / "own_one.py").write_text("class Own: pass\n")
    with pytest.raises(ConfigError, match=r"there is no feddm_flwr/contrib/own_one\.py"):
        check_there("train.objective", "feddm_flwr.contrib.own_one:Own")
    look_first_in(tmp_path)
    check_there("train.objective", "feddm_flwr.contrib.own_one:Own")
