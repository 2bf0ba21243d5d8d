"""What the default `preset` of a key means, given the other keys."""

from __future__ import annotations

from collections.abc import Mapping

from feddm_flwr.schema import PRESET, Scalar

#: What each strategy decides unless the user does (paper: FedDM, arXiv 2407.14730; settings ours).
STRATEGIES: dict[str, dict[str, Scalar]] = {
    "feddm-vanilla": {"codec.uplink": "none", "codec.downlink": "none"},
    "feddm-prox": {"train.mu": 0.01, "codec.uplink": "none", "codec.downlink": "none"},
    "feddm-quant": {"codec.uplink": "int8", "codec.downlink": "int8"},
    "feddm-lean": {
        "codec.uplink": "int2",
        "codec.downlink": "int2",
        "codec.target": "delta",
        "server.optimizer": "nesterov",
        "server.learning-rate": 1.0,
        "server.momentum": 0.4,
    },
    "feddm-slow-link": {
        "codec.uplink": "budget",
        "codec.downlink": "int2",
        "codec.target": "delta",
        "codec.residual-decay": 0.9,
        "server.optimizer": "nesterov",
        "server.learning-rate": 1.4,
        "server.momentum": 0.5,
    },
}
#: What each server optimizer decides: plain averaging; DiLoCo's outer step, by our sweep (see
#: docs/exchange.md); FedAdam (Reddi et al. 2021).
SERVER_OPTIMIZERS: dict[str, dict[str, Scalar]] = {
    "averaging": {"server.learning-rate": 1.0, "server.momentum": 0.0},
    "nesterov": {"server.learning-rate": 0.7, "server.momentum": 0.6},
    "adam": {"server.learning-rate": 0.01, "server.momentum": 0.9},
}
#: Architectures that train on a CPU.
MODELS: dict[str, dict[str, Scalar]] = {
    "tiny": {"model.block-channels": "16,32", "model.attention": "0,0"},
    "small": {"model.block-channels": "32,64", "model.attention": "0,1"},
    "medium": {"model.block-channels": "64,128,128", "model.attention": "0,1,0"},
}


def _known(size: int, channels: int, image: str, label: str, flip: bool) -> dict[str, Scalar]:
    return {
        "data.image-size": size,
        "data.channels": channels,
        "data.image-column": image,
        "data.label-column": label,
        "data.flip": flip,
    }


#: Data sets whose shape is known; for any other the user gives `data.image-size` and `data.channels`.
DATASETS: dict[str, dict[str, Scalar]] = {
    "digits": _known(8, 1, "image", "label", False),
    "ylecun/mnist": _known(28, 1, "image", "label", False),
    "zalando-datasets/fashion_mnist": _known(28, 1, "image", "label", True),
    "uoft-cs/cifar10": _known(32, 3, "img", "label", True),
}
#: Any other data: mirrored text or X-rays are wrong images, so flips are off unless asked for.
OTHER_DATA: dict[str, Scalar] = {
    "data.image-column": "image",
    "data.label-column": "label",
    "data.flip": False,
}


def decided(raw: Mapping[str, object]) -> dict[str, Scalar]:
    """The values that stand for `preset`, given the user's other choices."""

    def chosen(name: str, default: str) -> str:
        value = str(raw.get(name, PRESET))
        return default if value == PRESET else value

    strategy = STRATEGIES.get(chosen("strategy", "feddm-vanilla"), {})
    optimizer = chosen("server.optimizer", str(strategy.get("server.optimizer", "averaging")))
    if optimizer != strategy.get("server.optimizer"):  # its step size is for the optimizer that it chose
        strategy = {key: value for key, value in strategy.items() if not key.startswith("server.")}
    uplink = chosen("codec.uplink", str(strategy.get("codec.uplink", "none")))
    # The paper's scheme codes weights; whoever chooses codecs gets what is better.
    own = any(raw.get(key, PRESET) not in (PRESET, "none") for key in ("codec.uplink", "codec.downlink"))
    target = chosen("codec.target", str(strategy.get("codec.target", "delta" if own else "weights")))
    feedback = raw.get("codec.error-feedback", PRESET)
    if feedback == PRESET:
        feedback = target == "delta" and uplink != "none"
    decay = {"codec.residual-decay": strategy.get("codec.residual-decay", 1.0) if feedback else 1.0}
    return {
        "train.mu": 0.0,
        "server.optimizer": optimizer,
        **SERVER_OPTIMIZERS.get(optimizer, {}),
        **strategy,
        **MODELS.get(chosen("model.preset", "small"), {}),
        **DATASETS.get(chosen("data.name", "digits"), OTHER_DATA),
        "codec.target": target,
        "codec.error-feedback": bool(feedback),
        **decay,
    }
