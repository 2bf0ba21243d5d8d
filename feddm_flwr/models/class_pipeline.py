"""A diffusers pipeline for class-conditional U-Nets, on pixels or latents, and for flow matching on latents, for which
diffusers has none. A copy of this file lies in every model folder that needs it, so it imports nothing but diffusers
and torch:

    DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)(["cat", "dog"], guidance_scale=2.0)

Its annotations are no strings, and an optional one is `Optional`: diffusers 0.33 to 0.36 reads those of `__init__`.
"""

import inspect
import json
import operator
import os
import shutil
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class ClassPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Any of diffusers' samplers with classifier-free guidance (Ho and Salimans 2022)."""

    _optional_components = ["vae"]  # noqa: RUF012 (diffusers' own way)
    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: Any,
        vae: Optional[AutoencoderKL] = None,  # noqa: UP045
        class_names: str = "",
        flow: bool = False,
    ) -> None:
        """`class_names` are separated by commas, in the order of the labels; the label after the last is no class.
        `flow` tells whether the network was trained by flow matching."""
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(class_names=class_names, flow=flow)

    @torch.no_grad()
    def __call__(
        self,
        classes: list[str] | list[int] | str | int | None = None,
        guidance_scale: float = 2.0,
        num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int = 1,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws one image of each of the classes, names or labels; without any, one of each class that there is, or
        `batch_size` images where there is none.

        `output_type` is "pil", "np" or "pt" (values from 0 to 1), or "latent". Without `return_dict` a tuple comes
        back.

        Raises:
            ValueError: there is no such class, or the sampler is not one for this noise process.
        """
        names = [name.strip() for name in self.config.class_names.split(",") if name.strip()]
        asked: Any = range(len(names)) if classes is None else [classes] if _is_one(classes) else classes
        labels = [_label(one, names) for one in asked]
        c, device = self.unet.config, self._execution_device
        size = (c.sample_size, c.sample_size) if isinstance(c.sample_size, int) else tuple(c.sample_size)
        own = torch.tensor(labels, device=device) if names else None
        solver = self.scheduler
        flow = self.config.flow
        fits = type(solver).__name__.startswith("FlowMatch") if flow else hasattr(solver, "alphas_cumprod")
        if not fits:
            raise ValueError(f"{type(solver).__name__}: is for networks of another noise process than this one's")
        _set_timesteps(solver, num_inference_steps, device)
        x = randn_tensor((len(labels) if names else batch_size, c.in_channels, *size), generator, device)
        if not flow:
            x = x * solver.init_noise_sigma  # of some solvers the noise is beyond the range of half precision
        parameters = inspect.signature(solver.step).parameters
        added = {"generator": generator} if "generator" in parameters else {}
        for t in self.progress_bar(solver.timesteps):
            seen = (x if flow else solver.scale_model_input(x, t)).to(self.unet.dtype)
            predicted = guided(self.unet, seen, t, own, len(names), guidance_scale).float()
            x = solver.step(predicted, t, x, **added).prev_sample
        images = x if output_type == "latent" else self._decoded(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decoded(self, x: torch.Tensor, output_type: str) -> Any:
        if self.vae is not None:
            shift, scale = getattr(self.vae.config, "shift_factor", None) or 0.0, self.vae.config.scaling_factor
            x = x.to(self.vae.dtype)
            x = torch.cat([self.vae.decode(z / scale + shift).sample for z in x.split(1)])
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves the pipeline, as diffusers does, and its code, without which it could not be loaded."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(__file__, Path(save_directory, "pipeline.py"))
        file = Path(save_directory, "model_index.json")
        index = json.loads(file.read_text(encoding="utf-8"))
        index["_class_name"] = ["pipeline", type(self).__name__]
        file.write_text(json.dumps(index, indent=2), encoding="utf-8")


def _is_one(classes: Any) -> bool:
    return isinstance(classes, str) or (hasattr(classes, "__index__") and getattr(classes, "ndim", 0) == 0)


def _label(one: Any, names: list[str]) -> int:
    if isinstance(one, str) and one in names:
        return names.index(one)
    if not isinstance(one, str | bool) and hasattr(one, "__index__") and 0 <= operator.index(one) < len(names):
        return operator.index(one)  # NumPy's and torch's whole numbers, too
    if not names:
        raise ValueError(f"class {one!r}: the model knows no classes")
    raise ValueError(f"class {one!r}: must be one of {', '.join(names)}, or from 0 to {len(names) - 1}")


def _set_timesteps(solver: Any, steps: int, device: torch.device) -> None:
    """Sets that many steps, or the next fewer without one below 0, which diffusers' rounding adds to some numbers of
    trailing steps: a network knows none, and UniPC divides by its distance from step 0."""
    solver.set_timesteps(steps, device=device)
    while steps > 1 and solver.timesteps.min() < 0:
        steps -= 1
        solver.set_timesteps(steps, device=device)


def guided(
    unet: UNet2DModel,
    x: torch.Tensor,
    t: torch.Tensor,
    labels: Optional[torch.Tensor],  # noqa: UP045
    no_class: int,
    scale: float,
) -> torch.Tensor:
    """Returns the prediction for labels (B,), moved away from that for no class: scale 1 is no guidance."""
    if scale == 1 or labels is None:
        predicted: torch.Tensor = unet(x, t, labels).sample
        return predicted
    both = unet(torch.cat([x, x]), t, torch.cat([labels, torch.full_like(labels, no_class)])).sample
    with_class, without = both.chunk(2)
    moved: torch.Tensor = without + scale * (with_class - without)
    return moved
