"""What the default `preset` of a key means, given the other keys."""

from __future__ import annotations

from collections.abc import Mapping

from feddm_flwr.config.fields import PRESET, Scalar
from feddm_flwr.config.names import FLOW_SCHEDULERS, SCHEDULERS, SUM

_Keys = dict[str, Scalar]

#: What each strategy decides unless the user does (paper: FedDM, arXiv 2407.14730; settings ours).
STRATEGIES: dict[str, _Keys] = {
    "feddm-vanilla": {"codec.uplink": "none", "codec.downlink": "none"},
    "feddm-prox": {"train.mu": 0.01, "codec.uplink": "none", "codec.downlink": "none"},
    "feddm-quant": {"codec.uplink": "int8", "codec.downlink": "int8"},
    "feddm-lean": {
        "codec.uplink": "int2",
        "codec.downlink": "int2",
        "codec.target": "delta",
        "train.optimizer": "muon",
        "server.optimizer": "nesterov",
        "server.learning-rate": 1.0,
        "server.momentum": 0.4,
    },
    "feddm-slow-link": {
        "codec.uplink": "budget",
        "codec.downlink": "int2",
        "codec.target": "delta",
        "codec.residual-decay": 0.9,
        "train.optimizer": "muon",
        "server.optimizer": "nesterov",
        "server.learning-rate": 1.4,
        "server.momentum": 0.5,
    },
}
STRATEGIES["feddm-secure"] = STRATEGIES["feddm-lean"] | {"codec.uplink": SUM, "privacy.secure-aggregation": True}
#: Of an exponential average.
EMA_DECAY = 0.999
#: What each server optimizer decides: plain averaging; DiLoCo's outer step, by our sweep (see
#: docs/exchange.md); FedAdam (Reddi et al. 2021).
SERVER_OPTIMIZERS: dict[str, _Keys] = {
    "averaging": {"server.learning-rate": 1.0, "server.momentum": 0.0},
    "nesterov": {"server.learning-rate": 0.7, "server.momentum": 0.6},
    "adam": {"server.learning-rate": 0.01, "server.momentum": 0.9},
}

#: What each local optimizer decides; Muon's by a sweep of ours (benchmarks/fashionmnist.toml has what it is worth).
OPTIMIZERS: dict[str, _Keys] = {
    "adamw": {"train.learning-rate": 2e-3},
    "muon": {"train.learning-rate": 4e-3},
}


def _unet(
    channels: str, attention: str, layers: int = 1, head: int = 32, groups: int = 8, dropout: float = 0.0, **more: bool
) -> _Keys:
    return {
        "model.block-channels": channels,
        "model.attention": attention,
        "model.layers-per-block": layers,
        "model.attention-head-dim": head,
        "model.norm-groups": groups,
        "model.dropout": dropout,
        "model.time-scale-shift": more.get("time_scale_shift", False),
        "model.resnet-resampling": more.get("resnet_resampling", False),
    }


def _autoencoder(channels: str, layers: int, groups: int) -> _Keys:
    return {
        "autoencoder.block-channels": channels,
        "autoencoder.layers-per-block": layers,
        "autoencoder.norm-groups": groups,
    }


_SMALL_KL8 = _autoencoder("32,64,64,64", 1, 8)
#: Architectures. Those named after the paper's systems are the field's: for CIFAR-10 that of Ho et al. 2020 (and the
#: same for Fashion-MNIST, with a level less), for CelebA that of Song et al. 2021 (DDIM), for LSUN Church the U-Net and
#: the KL autoencoder, f = 8, of Rombach et al. 2022 (LDM), as far as diffusers has the blocks (heads of 32 channels
#: where theirs are 8 in number). Others train on a CPU.
MODELS: dict[str, _Keys] = {
    "tiny": _unet("16,32", "0,0") | _autoencoder("8,16,16", 1, 8),
    "small": _unet("32,64", "0,1") | _SMALL_KL8,
    "medium": _unet("64,128,128", "0,1,0") | _SMALL_KL8,
    "fashionmnist-28": _unet("128,256,256", "0,1,0", 2, 0, 32, 0.1) | _SMALL_KL8,
    "fashionmnist-28-small": _unet("32,64,64", "0,1,0") | _SMALL_KL8,
    "cifar10-32": _unet("128,256,256,256", "0,1,0,0", 2, 0, 32, 0.1) | _SMALL_KL8,
    "cifar10-32-small": _unet("64,128,128", "0,1,0") | _SMALL_KL8,
    "celeba-64": _unet("128,256,256,256,512", "0,0,1,0,0", 2, 0, 32) | _SMALL_KL8,
    "celeba-64-small": _unet("32,64,128,128", "0,0,1,0") | _SMALL_KL8,
    "lsun-church-256": _unet(
        "192,384,384,768,768", "1,1,1,1,0", 2, 32, 32, time_scale_shift=True, resnet_resampling=True
    )
    | _autoencoder("128,256,512,512", 2, 32),
    "lsun-church-256-small": _unet("64,128,128", "0,1,1") | _SMALL_KL8,
}

#: What a model to fine-tune brings with it.
ARCHITECTURE = frozenset(_unet("", ""))

_DIGITS = ",".join(map(str, range(10)))


def _known(size: int, channels: int, image: str, label: str, flip: bool, classes: str = _DIGITS) -> _Keys:
    return {
        "data.image-size": size,
        "data.channels": channels,
        "data.image-column": image,
        "data.label-column": label,
        "data.flip": flip,
        "data.classes": classes,
    }


_FASHION = "T - shirt / top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CIFAR = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
#: Data sets whose shape is known; for any other the user gives `data.image-size` and `data.channels`.
DATASETS: dict[str, _Keys] = {
    "digits": _known(8, 1, "image", "label", False),
    "ylecun/mnist": _known(28, 1, "image", "label", False),
    "zalando-datasets/fashion_mnist": _known(28, 1, "image", "label", True, _FASHION),
    "uoft-cs/cifar10": _known(32, 3, "img", "label", True, _CIFAR),
}
#: Any other data: mirrored text or X-rays are wrong images, so flips are off unless asked for.
OTHER_DATA: _Keys = {
    "data.image-column": "image",
    "data.label-column": "label",
    "data.flip": False,
    "data.classes": "",
}


def decided(raw: Mapping[str, object]) -> dict[str, Scalar]:
    """Returns the values that stand for `preset`, given the user's other choices."""

    def chosen(name: str, default: str) -> str:
        value = str(raw.get(name, PRESET))
        return default if value == PRESET else value

    strategy = STRATEGIES.get(chosen("strategy", "feddm-vanilla"), {})
    optimizer = chosen("server.optimizer", str(strategy.get("server.optimizer", "averaging")))
    if optimizer != strategy.get("server.optimizer"):  # its step size is for the optimizer that it chose
        strategy = {key: value for key, value in strategy.items() if not key.startswith("server.")}
    local = chosen("train.optimizer", str(strategy.get("train.optimizer", "adamw")))
    secure = raw.get("privacy.secure-aggregation", PRESET)
    if secure == PRESET:
        secure = strategy.get("privacy.secure-aggregation", False)
    coding = {"codec.uplink": SUM} if secure is True else {}
    uplink = chosen("codec.uplink", str((strategy | coding).get("codec.uplink", "none")))
    # The paper's scheme codes weights; whoever chooses codecs gets what is better.
    own = any(raw.get(key, PRESET) not in (PRESET, "none") for key in ("codec.uplink", "codec.downlink"))
    weights = strategy.get("codec.target", "delta" if own else "weights")
    target = chosen("codec.target", "delta" if coding else str(weights))
    feedback = raw.get("codec.error-feedback", PRESET)
    if feedback == PRESET:
        feedback = target == "delta" and uplink != "none"
    data = DATASETS.get(chosen("data.name", "digits"), OTHER_DATA)
    if raw.get("model.class-conditional") is not True:
        data = data | {"data.classes": ""}
    by_power = raw.get("server.ema-decay", PRESET) == PRESET
    decay = {"codec.residual-decay": strategy.get("codec.residual-decay", 1.0) if feedback else 1.0}
    return {
        "sample.scheduler": (FLOW_SCHEDULERS if raw.get("diffusion.prediction") == "flow" else SCHEDULERS)[0],
        "train.mu": 0.0,
        "train.optimizer": local,
        **OPTIMIZERS["muon" if local == "muon" else "adamw"],
        "server.average": "power" if by_power else "exponential",
        "server.ema-decay": EMA_DECAY,
        "server.optimizer": optimizer,
        **SERVER_OPTIMIZERS.get(optimizer, {}),
        **strategy,
        **coding,
        "privacy.secure-aggregation": secure is True,
        **MODELS.get(chosen("model.preset", "small"), {}),
        **data,
        "codec.target": target,
        "codec.error-feedback": bool(feedback),
        **decay,
    }
