"""The U-Net, and its parameters as one flat vector."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from feddm_flwr.config import RunConfig, derive_seed

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the parameters, in the order in which the flat vector holds them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Number of values in the flat vector."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    @property
    def fingerprint(self) -> str:
        """32 hex digits that two layouts share only if names, shapes and order agree."""
        return hashlib.sha256(json.dumps([self.names, self.shapes]).encode()).hexdigest()[:32]


def build(config: RunConfig) -> UNet2DModel:
    """The U-Net with initial weights that depend on the seed only."""
    m, n = config.model, len(config.model.block_channels)
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in m.attention]
    up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(m.attention)]
    assert len(down) == len(up) == n
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        return UNet2DModel(
            sample_size=config.data.image_size,
            in_channels=config.data.channels,
            out_channels=config.data.channels,
            block_out_channels=m.block_channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            layers_per_block=m.layers_per_block,
            attention_head_dim=m.attention_head_dim,
            norm_num_groups=m.norm_groups,
            dropout=m.dropout,
        )


def layout(model: torch.nn.Module) -> Layout:
    """The layout of the model's parameters.

    Raises:
        ValueError: the model has floating-point buffers, which the exchange would lose.
    """
    buffers = [name for name, b in model.named_buffers() if b.is_floating_point()]
    if buffers:
        raise ValueError(f"buffers {buffers} would not be exchanged: use a model without them")
    named = dict(model.named_parameters())
    return Layout(tuple(named), tuple(tuple(p.shape) for p in named.values()))


def to_vector(model: torch.nn.Module) -> Vector:
    """The parameters as one float32 vector on the CPU, shape (layout.size,)."""
    result: Vector = flat(model).cpu().numpy()
    return result


def flat(model: torch.nn.Module) -> torch.Tensor:
    """The parameters as one float32 vector where they are, shape (layout.size,)."""
    return torch.cat([p.detach().reshape(-1).float() for p in model.parameters()])


def load_vector(model: torch.nn.Module, vector: Vector) -> None:
    """Write a flat vector into the parameters, in place.

    Raises:
        ValueError: the vector has another length than the model.
    """
    parameters = list(model.parameters())
    size = sum(p.numel() for p in parameters)
    if vector.shape != (size,):
        raise ValueError(f"the model has {size} parameters, the vector has shape {vector.shape}")
    values = torch.from_numpy(np.ascontiguousarray(vector))
    with torch.no_grad():
        for p, part in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))


def noise_scheduler(config: RunConfig) -> DDPMScheduler:
    """The diffusers scheduler of the configured process, as the pipeline folder carries it."""
    d = config.diffusion
    return DDPMScheduler(
        num_train_timesteps=d.timesteps,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[d.schedule],
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[d.prediction],
    )


def save_pipeline(network: UNet2DModel, config: RunConfig, path: Path, card: str) -> None:
    """Write a folder that `DDPMPipeline.from_pretrained` loads, with a model card."""
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    DDPMPipeline(unet=network.float().cpu(), scheduler=noise_scheduler(config)).save_pretrained(path)
    (path / "README.md").write_text(card, encoding="utf-8")
