"""Low-rank adapters (Hu et al. 2022), through peft."""

from __future__ import annotations

from typing import TYPE_CHECKING

from feddm_flwr.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from torch import nn


def add_adapters(network: nn.Module, config: RunConfig) -> None:
    """Freezes the network and adds low-rank adapters (Hu et al. 2022), through peft."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"model.lora-rank = {config.model.lora_rank}: {error.name} is not installed: pip install 'feddm-flwr[lora]'"
        ) from error
    targets = [t.strip() for t in config.model.lora_targets.split(",") if t.strip()]
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name.endswith(target) for name in names):
            raise ConfigError(
                f"model.lora-targets = {config.model.lora_targets!r}: no layer's name ends with {target!r}"
            )
    rank = config.model.lora_rank
    LoraModel(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), "default")


def merge_adapters(network: nn.Module) -> None:
    """Puts what the adapters learnt into the layers that they are of, and removes them."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ModuleNotFoundError:  # then there are none
        return
    for name, layer in [*network.named_modules()]:
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, layer.get_base_layer())
    network.requires_grad_(True)
