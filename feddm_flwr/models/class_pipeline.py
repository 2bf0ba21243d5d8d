"""A diffusers pipeline for class-conditional U-Nets, on pixels or latents. A copy of this file lies in every model
folder that needs it, so it imports nothing but diffusers and torch:

    DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)(["cat", "dog"], guidance_scale=2.0)
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DModel, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor


class ClassPipeline(DiffusionPipeline):  # type: ignore[misc]
    """UniPC (Zhao et al. 2023) with classifier-free guidance (Ho and Salimans 2022)."""

    _optional_components = ["vae"]  # noqa: RUF012 (diffusers' own way)

    def __init__(
        self, unet: UNet2DModel, scheduler: Any, vae: AutoencoderKL | None = None, class_names: str = ""
    ) -> None:
        """`class_names` are separated by commas, in the order of the labels; the label after the last is no class."""
        super().__init__()
        self.register_modules(unet=unet, scheduler=UniPCMultistepScheduler.from_config(scheduler.config), vae=vae)
        self.register_to_config(class_names=class_names)

    @torch.no_grad()
    def __call__(
        self,
        classes: list[str] | list[int] | str | int | None = None,
        guidance_scale: float = 2.0,
        num_inference_steps: int = 25,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draws one image of each of the classes, names or labels; without any, one of each class that there is.

        Raises:
            ValueError: there is no such class.
        """
        names = [name.strip() for name in self.config.class_names.split(",")]
        asked = range(len(names)) if classes is None else [classes] if isinstance(classes, str | int) else classes
        labels = []
        for one in asked:
            if one not in names and one not in range(len(names)):
                raise ValueError(f"class {one!r}: must be one of {', '.join(names)}, or below {len(names)}")
            labels.append(names.index(one) if isinstance(one, str) else int(one))
        c, device = self.unet.config, self.unet.device
        size = (c.sample_size, c.sample_size) if isinstance(c.sample_size, int) else tuple(c.sample_size)
        x = randn_tensor((len(labels), c.in_channels, *size), generator, device, self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            predicted = guided(self.unet, x, t, torch.tensor(labels, device=device), len(names), guidance_scale)
            x = self.scheduler.step(predicted, t, x).prev_sample
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            x = torch.cat([self.vae.decode(z / self.vae.config.scaling_factor + shift).sample for z in x.split(1)])
        images = (x.float() / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(images) if output_type == "pil" else images)


def guided(
    unet: UNet2DModel, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, no_class: int, scale: float
) -> torch.Tensor:
    """Returns the prediction for labels (B,), moved away from that for no class: scale 1 is no guidance."""
    if scale == 1:
        predicted: torch.Tensor = unet(x, t, labels).sample
        return predicted
    both = unet(torch.cat([x, x]), t, torch.cat([labels, torch.full_like(labels, no_class)])).sample
    with_class, without = both.chunk(2)
    moved: torch.Tensor = without + scale * (with_class - without)
    return moved
