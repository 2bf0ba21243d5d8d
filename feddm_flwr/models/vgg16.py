"""How different two images look: distances of VGG16's features (Zhang et al. 2018, LPIPS, with every channel weighing
alike instead of by their learnt weights)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, normalize

#: Widths of the convolutions between poolings (Simonyan and Zisserman 2015, configuration D).
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
#: Mean and standard deviation of the images that the weights were trained on, for pixels in [-1, 1].
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class VGG16(nn.Module):
    """VGG16's convolutions, frozen."""

    _mean: Tensor
    _std: Tensor

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """`tensors` by torchvision's and timm's names, `features.0.weight` and so on; others are passed over.

        Raises:
            ValueError: they are not VGG16's.
        """
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for block in _BLOCKS:
            for wider in block:
                layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
                width = wider
            layers.append(nn.Identity())  # the place of a pooling, in the names too
        self.features = nn.Sequential(*layers)
        if tensors is not None:
            own = self.state_dict()
            for name, value in own.items():
                if name not in tensors or tensors[name].shape != value.shape:
                    raise ValueError(f"{name} of shape {tuple(value.shape)} is not there")
            self.load_state_dict({name: tensors[name] for name in own})
        for name, values in (("_mean", _MEAN), ("_std", _STD)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the distances of images in [-1, 1], (B, 1 or 3, H, W), to others: shape (B,)."""
        z = (torch.cat([x, y]).expand(-1, 3, -1, -1) - self._mean) / self._std
        distance = torch.zeros(len(x), device=x.device)
        for layer in self.features:
            if isinstance(layer, nn.Identity):
                of_x, of_y = normalize(z.float(), eps=1e-5).chunk(2)
                distance = distance + (of_x - of_y).square().sum(1).mean((1, 2))
                if min(z.shape[-2:]) < 2:
                    break
                z = max_pool2d(z, 2)
            else:
                z = layer(z)
        return distance
