"""Every kind of model that a run can train, from the first round to a folder that diffusers loads."""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel, VQModel
from local_grid import AS_PRESET, LocalGrid, config, nodes
from safetensors.torch import load_file, save_file

from feddm_flwr.cli.main import main
from feddm_flwr.cli.trained_model import How, draw
from feddm_flwr.config import ConfigError
from feddm_flwr.data.node_data import load_node
from feddm_flwr.evaluation.global_model import GlobalModel
from feddm_flwr.exchange.partial import split_of
from feddm_flwr.models import networks, parameters, pipelines, pretrained
from feddm_flwr.models.autoencoder import decode
from feddm_flwr.models.vgg16 import VGG16
from feddm_flwr.server.final_evaluation import evaluate_at_nodes
from feddm_flwr.server.round import RoundResult
from feddm_flwr.server.strategy import FedDM
from feddm_flwr.storage.state_folder import state_root


def trained(folder: Path, **keys: Any) -> list[RoundResult]:
    """Run two rounds with four nodes, and write `folder`/model."""
    c = config(num_server_rounds=2, **keys)
    files = pretrained.fetch(c, folder / "assets")
    network = networks.build(c, files)
    parts = split_of(parameters.layout(network), c)
    feddm = FedDM(c, parts.shared.take(parameters.to_vector(network)), parts, uuid.uuid4().hex, files)
    grid = LocalGrid(nodes(c))
    rounds = list(feddm.run(grid))
    assert all(r.clients_ok == 4 and not r.failures for r in rounds)
    parameters.load_vector(network, feddm.averaged)
    autoencoder = c.stage == "autoencoder"
    last = evaluate_at_nodes(feddm, grid, GlobalModel(network, c, files), None) if autoencoder else None
    pipelines.save(network, c, files, folder / "model", "card", last.latent_power if last else None)
    return rounds


def tuned(base: Path, **keys: Any) -> Any:
    """The network of a run that fine-tunes a model."""
    c = config(model__init_from=str(base), **keys)
    return networks.build(c, pretrained.fetch(c, base.parent / uuid.uuid4().hex))


def drawn(folder: Path) -> tuple[str, tuple[int, int]]:
    pipeline = DiffusionPipeline.from_pretrained(str(folder / "model"), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return type(pipeline).__name__, pipeline(num_inference_steps=3).images[0].size


def test_a_class_conditional_model_knows_its_classes_though_each_node_has_but_one(tmp_path: Path) -> None:
    trained(tmp_path, model__class_conditional=True, data__partition="pathological", data__classes_per_node=1)
    assert drawn(tmp_path) == ("ClassPipeline", (8, 8))
    assert pipelines.class_names(pipelines.load(tmp_path / "model")) == [str(i) for i in range(10)]


def test_a_class_is_sampled_when_asked_for_and_others_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, model__class_conditional=True, **AS_PRESET)

    def drawn_by(*arguments: str) -> list[bytes]:
        line = ["sample", str(tmp_path), "-n", "2", "--steps", "4", "-o", str(tmp_path / "images.npz"), *arguments]
        assert main(line) == 0
        return [image.tobytes() for image in np.load(tmp_path / "images.npz")["images"]]

    three = drawn_by("--class", "3", "--guidance", "2")
    assert drawn_by("--class", "3") == three
    assert drawn_by("--class", "4") != three
    assert drawn_by("--class", "3", "--guidance", "5") != three
    assert main(["sample", str(tmp_path), "--class", "cat"]) == 2
    assert "--class = 'cat': must be one of 0, 1, 2" in capsys.readouterr().err


def test_an_autoencoder_is_trained_and_a_latent_model_on_it(tmp_path: Path) -> None:
    exact = {"data__image_size": 16, "train__precision": "fp32"}
    rounds = trained(tmp_path / "first", stage="autoencoder", **exact)
    assert rounds[-1].eval_loss < rounds[0].eval_loss
    autoencoder = AutoencoderKL.from_pretrained(tmp_path / "first" / "model").eval()
    power = []
    for i in range(4):  # the nodes' own, on the weights that are shipped
        held_out = load_node(config(**exact).data, 0, (i, 4), None, state_root(None)).held_out[:256]
        with torch.no_grad():
            latents = autoencoder.encode(torch.from_numpy(held_out).float() / 127.5 - 1).latent_dist
        power.append(float((latents.mean.square() + latents.var).mean()))
    assert autoencoder.config.scaling_factor == pytest.approx(1 / math.sqrt(np.median(power)), rel=1e-4)
    latent = {"model__kind": "ldm", "data__image_size": 16, "model__autoencoder": str(tmp_path / "first" / "model")}
    first, second = trained(tmp_path / "second", strategy="feddm-lean", **latent)
    assert first.bytes_other > 4 * 100_000  # the autoencoder is sent once, and counted apart
    assert second.bytes_other == 0
    assert drawn(tmp_path / "second") == ("LDMPipeline", (16, 16))
    flow = config(num_server_rounds=1, diffusion__prediction="flow", **latent)
    files = pretrained.fetch(flow, tmp_path / "flow")
    pipelines.save(networks.build(flow, files), flow, files, tmp_path / "flow" / "model", "")
    assert drawn(tmp_path / "flow") == ("ClassPipeline", (16, 16))  # diffusers has no other for latents
    assert draw(tmp_path / "flow" / "model", How("", 3, None, 0), 2).shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    ("keys", "kind"), [({}, "DDPMPipeline"), ({"model__class_conditional": True}, "ClassPipeline")]
)
def test_a_flow_is_trained_drawn_alike_by_us_and_diffusers_and_trained_on(
    keys: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    flow = {"diffusion__prediction": "flow", **keys}
    before, after = trained(tmp_path, strategy="feddm-lean", **flow)
    assert after.eval_loss < before.eval_loss
    pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "model"), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(5)
    asked = {"classes": "3", "guidance_scale": 1.0} if keys else {}
    theirs = pipeline(num_inference_steps=10, generator=noise, output_type="np", **asked).images[0] * 255
    ours = draw(tmp_path / "model", How("", 10, 1.0, 5), 1, "3" if keys else None)[0]
    np.testing.assert_allclose(ours.transpose(1, 2, 0), theirs.reshape(8, 8, 1), atol=1.01)
    with pytest.raises(ConfigError, match=r"--scheduler = 'ddim': must be euler or heun"):
        draw(tmp_path / "model", How("ddim", 10, None, 0), 1)
    tuned(tmp_path / "model", **flow)
    with pytest.raises(ConfigError, match=r"diffusion.prediction = 'v' .* was trained with flow"):
        tuned(tmp_path / "model", **keys)
    if keys:
        pipeline.scheduler = DDPMScheduler()
        with pytest.raises(ValueError, match="another noise process"):
            pipeline("3")


def test_a_perceptual_loss_is_sent_to_the_nodes_and_changes_the_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(VGG16().state_dict(), tmp_path / "vgg.safetensors")
    keys: dict[str, Any] = {"stage": "autoencoder", "data__image_size": 16}
    plain = trained(tmp_path / "plain", **keys)
    looked_at = trained(tmp_path / "looked-at", **keys, autoencoder__perceptual=str(tmp_path / "vgg.safetensors"))
    assert looked_at[0].bytes_other > plain[0].bytes_other + 4 * 4 * 14_700_000
    assert looked_at[1].bytes_down == pytest.approx(plain[1].bytes_down, rel=0.01)
    assert looked_at[0].train_loss > plain[0].train_loss
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    wrong = config(**keys, autoencoder__perceptual=str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match=r"autoencoder\.perceptual = .*cannot be read"):
        pretrained.fetch(wrong, tmp_path)


def test_looks_differ_more_where_more_differs() -> None:
    torch.manual_seed(0)
    network, x = VGG16(), torch.rand(2, 1, 32, 32) * 2 - 1
    noise = torch.randn_like(x)
    assert network(x, x).tolist() == [0, 0]
    near, far = network(x + 0.05 * noise, x), network(x + 0.5 * noise, x)
    assert near.shape == (2,)
    assert (near < far).all()


def test_an_optimizer_in_8_bits_trains_as_well(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="an extra; where it is installed, diffusers has it print a warning")
    exact = trained(tmp_path / "exact")[-1].train_loss
    eight_bit = trained(tmp_path / "eight-bit", train__optimizer="adamw8bit")[-1].train_loss
    assert eight_bit != exact
    assert eight_bit == pytest.approx(exact, rel=0.02)


def test_adapters_are_all_that_travels_and_end_up_in_the_model(tmp_path: Path) -> None:
    trained(tmp_path / "base")
    lora = {"model__init_from": str(tmp_path / "base" / "model"), "model__lora_rank": 2}
    _, second = trained(tmp_path / "tuned", **lora, model__lora_targets="to_q,to_v")
    assert second.bytes_up < 10_000
    assert drawn(tmp_path / "tuned") == ("DDPMPipeline", (8, 8))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"diffusion__prediction": "epsilon"}, r"diffusion.prediction = 'epsilon': .* was trained with 'v'; must be"),
        ({"diffusion__timesteps": 500}, r"diffusion.timesteps = 500: .* was trained with 1000; must be the same"),
        ({"diffusion__schedule": "linear"}, r"diffusion.schedule = 'linear': .* was trained with 'cosine'"),
        ({"model__preset": "small", "model__dropout": 0.5}, r"model.dropout = 0.5 with model.init-from: that model"),
        ({"model__class_conditional": True, "model__lora_rank": 2}, r"it knows 0 classes, this run 10"),
        ({"data__channels": 3}, r"it has 1 channels, here 3 are needed"),
    ],
)
def test_a_model_to_fine_tune_must_fit_the_run(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    c = config()
    pipelines.save(networks.build(c, {}), c, {}, tmp_path / "model", "")
    with pytest.raises(ConfigError, match=said):
        tuned(tmp_path / "model", **keys)


def test_the_process_of_a_model_is_found_where_old_repositories_have_it(tmp_path: Path) -> None:
    networks.build(config(), {}).save_pretrained(tmp_path / "old")
    noise = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_end": 0.01}
    (tmp_path / "old" / "scheduler_config.json").write_text(json.dumps(noise))  # without prediction_type
    with pytest.raises(ConfigError) as caught:
        tuned(tmp_path / "old")
    assert "diffusion.schedule = 'cosine': model.init-from" in str(caught.value)
    assert "diffusion.prediction = 'v': model.init-from" in str(caught.value)
    with pytest.raises(ConfigError, match=r"trained with betas from 0.0001 to 0.01, not 1e-4 to 0.02"):
        tuned(tmp_path / "old", diffusion__schedule="linear", diffusion__prediction="epsilon")


def test_a_class_pipeline_draws_in_half_precision(tmp_path: Path) -> None:
    c = config(model__class_conditional=True)
    pipelines.save(networks.build(c, {}), c, {}, tmp_path, "")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("3", num_inference_steps=2).images[0].size == (8, 8)


def test_classes_are_added_to_a_model_that_has_none_and_others_than_its_own_are_refused(tmp_path: Path) -> None:
    c = config()
    pipelines.save(networks.build(c, {}), c, {}, tmp_path / "model", "")
    keys: dict[str, Any] = {"model__class_conditional": True}
    network = tuned(tmp_path / "model", **keys)
    pipelines.save(network, config(**keys), {}, tmp_path / "ten", "")
    eleven = {"data__name": "own", "data__image_size": 8, "data__channels": 1, "data__classes": ",".join("abcdefghijk")}
    with pytest.raises(ConfigError, match="it knows 10 classes, this run 11"):
        tuned(tmp_path / "ten", **keys, **eleven)
    with pytest.raises(ConfigError, match="it knows 10 classes, this run 0"):
        tuned(tmp_path / "ten")


def test_latents_are_decoded_in_ever_smaller_tiles_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(stage="autoencoder", data__image_size=64)
    model_ = networks.build(c, {}).eval()
    latents = torch.randn(2, 4, 16, 16)
    whole = decode(model_, latents)
    real = model_.decoder.forward
    sizes = []

    def short(z: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(z.shape[-1])
        if z.shape[-1] > 8:
            raise torch.OutOfMemoryError
        return real(z, *rest)

    monkeypatch.setattr(model_.decoder, "forward", short)
    tiled = decode(model_, latents)
    assert tiled.shape == whole.shape
    assert max(sizes[1:]) == 8
    model_.disable_tiling()
    monkeypatch.setattr(model_.decoder, "forward", lambda z, *rest: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        decode(model_, latents)


@pytest.mark.parametrize("key", ["model.autoencoder", "model.init-from"])
def test_a_model_that_is_not_there_is_named(key: str, tmp_path: Path) -> None:
    keys = {key.replace(".", "__").replace("-", "_"): str(tmp_path / "nowhere")}
    kind = {"model__kind": "ldm"} if key == "model.autoencoder" else {}
    with pytest.raises(ConfigError, match=f"{key} = .*nowhere'.*cannot be read"):
        pretrained.fetch(config(**keys, **kind), tmp_path)


def test_a_model_of_another_class_is_named(tmp_path: Path) -> None:
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vq" / "vqvae")
    with pytest.raises(ConfigError, match=r"model\.autoencoder = .*vq': is a VQModel; must be an AutoencoderKL"):
        pretrained.fetch(config(model__kind="ldm", model__autoencoder=str(tmp_path / "vq")), tmp_path)
    told = UNet2DConditionModel(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, cross_attention_dim=8)
    told.save_pretrained(tmp_path / "text" / "unet")
    with pytest.raises(ConfigError, match=r"init-from = .*text': is a UNet2DConditionModel; must be a UNet2DModel"):
        pretrained.fetch(config(model__init_from=str(tmp_path / "text")), tmp_path)


def test_weights_of_a_variant_are_found(tmp_path: Path) -> None:
    c = config()
    pipelines.save(networks.build(c, {}).half(), c, {}, tmp_path / "model", "")
    pipelines.load(tmp_path / "model").to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert not list(tmp_path.glob("half/unet/diffusion_pytorch_model.safetensors"))
    assert pretrained.fetch(config(model__init_from=str(tmp_path / "half")), tmp_path / "assets").keys() == {"unet"}
    assert pipelines.load(tmp_path / "half").unet.config.sample_size == 8


def test_a_run_s_folder_is_its_model_and_a_file_without_all_weights_is_none(tmp_path: Path) -> None:
    c = config()
    pipelines.save(networks.build(c, {}), c, {}, tmp_path / "model", "")
    (tmp_path / "config.toml").write_text("")
    of_run = config(model__init_from=str(tmp_path))
    assert pretrained.fetch(of_run, tmp_path / "assets").keys() == {"unet"}
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.bias"]
    save_file(weights, file)
    with pytest.raises(ConfigError, match=r"cannot be read \(ValueError: it lacks 1 of its weights, conv_in\.bias amo"):
        pretrained.fetch(of_run, tmp_path / "others")


def test_a_run_of_an_autoencoder_has_nothing_to_be_drawn_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "model")
    for command in (["sample", str(tmp_path)], ["evaluate", str(tmp_path)], ["sample", str(tmp_path / "model")]):
        assert main(command) == 2
        assert "is an AutoencoderKL, which draws nothing by itself; name a model trained on it (model.autoencoder" in (
            capsys.readouterr().err
        )
