"""The README.md that goes with a model."""

from __future__ import annotations

from collections.abc import Mapping

from feddm_flwr.reporting.records import without_places


def model_card(
    config: Mapping[str, object],
    rounds: int,
    nodes: int,
    width: float | None,
    chosen_by: str,
    epsilon: float | None,
    *,
    simulated: bool,
) -> str:
    """Returns the README.md of a pipeline folder, whose weights are an average of this width; `chosen_by` is the figure
    that it is the best by, "" where no others were tried. `epsilon` is the most that a node has spent, None where that
    does not count."""
    size = config["data.image-size"]
    keys = (
        "strategy",
        "data.name",
        *(["data.partition"] if simulated else []),
        "train.local-steps",
        "train.local-epochs",
        "train.optimizer",
        "train.learning-rate",
        *(["finish.rounds", "finish.local-steps", "finish.learning-rate"] if config["finish.rounds"] else []),
        "codec.uplink",
        "codec.downlink",
        "server.optimizer",
        *(["server.ema-decay"] if width is None else []),
        "seed",
    )
    shown = without_places(config)
    table = "\n".join(f"| `{key}` | `{shown[key]}` |" for key in keys)
    what, code = _use(config)
    diffusion = config["stage"] == "diffusion"
    title = "A diffusion model" if diffusion else "An autoencoder"
    tag = "pipeline_tag: unconditional-image-generation\n" if diffusion else ""
    # With 61, diffusers' "trailing" spacing ends one step too far.
    divides = not config["model.class-conditional"] and config["diffusion.prediction"] != "flow"
    note = f"\nTake a number of steps that divides {config['diffusion.timesteps']}: some others give noise.\n"
    return f"""---
library_name: diffusers
{tag}tags: [diffusers, federated-learning, feddm]
---
# {title} trained by {nodes} nodes that kept their images

{what} for {size}x{size} images, trained with FedDM (Vora et al., arXiv 2407.14730; settings ours)
over {rounds} rounds. {_average(width, chosen_by)}

```python
{code}
```
{note if diffusion and divides else ""}
| setting | value |
|---|---|
{table}

{_privacy(config, epsilon)}
"""


def _privacy(config: Mapping[str, object], epsilon: float | None) -> str:
    """Returns what the model may tell of the images that it was trained on."""
    sums = "\nThe server learned the sums of the nodes' updates, and no update of a single node (secure aggregation)."
    if not config.get("privacy.secure-aggregation"):
        sums = ""
    if epsilon is None:
        return f"""No image left a node, but this is not a privacy guarantee: a diffusion model can memorize training
images, and averaged updates can be inverted. Treat the model as you would treat the images.{sums}"""
    if config["privacy.mechanism"] == "dp-fedavg":
        return f"""Every node is protected by differential privacy (DP-FedAvg): the model is ({epsilon:.3g},
{config["privacy.delta"]})-private for what one node has in place of another, in this run alone. The server saw every
node's update, and the figures of the run's report are not covered."""
    told = (
        "" if config["privacy.figures"] == "none" else " Figures that the nodes told of their images are not covered."
    )
    return f"""Every training image is protected by differential privacy (DP-SGD at the nodes): the model is
({epsilon:.3g}, {config["privacy.delta"]})-private for whether an image was there, at the node that spent most, in this
run alone.{told} Earlier runs on the same images add to it: each node keeps a ledger.{sums}"""


def _average(width: float | None, chosen_by: str) -> str:
    """Returns what average of the global model the weights are."""
    if width is None:
        return "The weights are the exponential moving average of the global model."
    best = f" They are the best of several by {'FID' if chosen_by == 'fid' else 'held-out loss'}." if chosen_by else ""
    of = (
        f"a moving average of the global model (EDM2, relative width {width:g})" if width else "those of the last round"
    )
    return f"The weights are {of}.{best}"


def _use(config: Mapping[str, object]) -> tuple[str, str]:
    """Returns what is in a model's folder, and how it is used with diffusers."""
    folder = '"path/to/this/folder"'
    if config["stage"] == "autoencoder":
        code = f"from diffusers import AutoencoderKL\n\nautoencoder = AutoencoderKL.from_pretrained({folder})"
        return "An `AutoencoderKL`", code
    if config["model.class-conditional"]:
        names = str(config["data.classes"]).split(",")
        code = f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({folder}, trust_remote_code=True)  # pipeline.py, in this folder
images = pipeline(["{names[0].strip()}", "{names[-1].strip()}"], guidance_scale=2.0).images"""
        return f"A class-conditional `UNet2DModel` ({config['model.kind']}, classes {config['data.classes']})", code
    # The folder's own, DDPMPipeline, would take all of the noise levels.
    if config["diffusion.prediction"] == "flow":
        code = _flow_use(config["model.kind"] == "ldm", folder)
        return f"A `UNet2DModel` ({config['model.kind']}, flow matching)", code
    pipeline = "LDMPipeline" if config["model.kind"] == "ldm" else "DDIMPipeline"
    code = f"""from diffusers import {pipeline}

images = {pipeline}.from_pretrained({folder})(batch_size=16, num_inference_steps=50).images"""
    return f"A `UNet2DModel` ({config['model.kind']})", code


def _flow_use(latent: bool, folder: str) -> str:
    if latent:
        return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({folder}, trust_remote_code=True)  # pipeline.py, in this folder
images = pipeline(batch_size=16, num_inference_steps=50).images"""
    return f"""from diffusers import DDPMPipeline

images = DDPMPipeline.from_pretrained({folder})(batch_size=16, num_inference_steps=50).images"""
