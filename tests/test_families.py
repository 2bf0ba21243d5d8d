"""Every kind of model that a run can train, from the first round to a folder that diffusers loads."""

from __future__ import annotations

import math
import uuid
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from local_grid import LocalGrid, config, nodes

from feddm_flwr import architecture, assets, model, pipelines
from feddm_flwr.config import ConfigError
from feddm_flwr.parts import parts_of
from feddm_flwr.strategy import FedDM
from feddm_flwr.tally import Round


def trained(folder: Path, **keys: Any) -> list[Round]:
    """Run two rounds with four nodes, and write `folder`/model."""
    c = config(num_server_rounds=2, **keys)
    files = assets.fetch(c, folder / "assets")
    network = architecture.build(c, files)
    parts = parts_of(model.layout(network), c)
    feddm = FedDM(c, parts.shared.take(model.to_vector(network)), parts, uuid.uuid4().hex, files)
    rounds = list(feddm.run(LocalGrid(nodes(c))))
    assert all(r.clients_ok == 4 and not r.failures for r in rounds)
    model.load_vector(network, feddm.ema)
    power = rounds[-1].latent_power
    pipelines.save(network, c, files, folder / "model", "card", power if math.isfinite(power) else 1.0)
    return rounds


def drawn(folder: Path) -> tuple[str, tuple[int, int]]:
    pipeline = DiffusionPipeline.from_pretrained(str(folder / "model"), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return type(pipeline).__name__, pipeline(num_inference_steps=3).images[0].size


def test_a_class_conditional_model_knows_its_classes(tmp_path: Path) -> None:
    trained(tmp_path, model__class_conditional=True)
    assert drawn(tmp_path) == ("ClassPipeline", (8, 8))
    assert pipelines.class_names(pipelines.load(tmp_path / "model")) == [str(i) for i in range(10)]


def test_an_autoencoder_is_trained_and_a_latent_model_on_it(tmp_path: Path) -> None:
    rounds = trained(tmp_path / "first", stage="autoencoder", data__image_size=16)
    assert "psnr" in rounds[-1].figures()
    latent = {"model__kind": "ldm", "data__image_size": 16, "model__autoencoder": str(tmp_path / "first" / "model")}
    first, second = trained(tmp_path / "second", strategy="feddm-lean", **latent)
    assert first.bytes_down > 5 * second.bytes_down  # the autoencoder is sent once
    assert drawn(tmp_path / "second") == ("LDMPipeline", (16, 16))


def test_adapters_are_all_that_travels_and_end_up_in_the_model(tmp_path: Path) -> None:
    trained(tmp_path / "base")
    lora = {"model__init_from": str(tmp_path / "base" / "model"), "model__lora_rank": 2}
    _, second = trained(tmp_path / "tuned", **lora, model__lora_targets="to_q,to_v")
    assert second.bytes_up < 10_000
    assert drawn(tmp_path / "tuned") == ("DDPMPipeline", (8, 8))


@pytest.mark.parametrize("key", ["model.autoencoder", "model.init-from"])
def test_a_model_that_is_not_there_is_named(key: str, tmp_path: Path) -> None:
    keys = {key.replace(".", "__").replace("-", "_"): str(tmp_path / "nowhere")}
    kind = {"model__kind": "ldm"} if key == "model.autoencoder" else {}
    with pytest.raises(ConfigError, match=f"{key} = .*nowhere'.*cannot be read"):
        assets.fetch(config(**keys, **kind), tmp_path)
