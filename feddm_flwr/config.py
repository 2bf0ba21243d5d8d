"""The typed, validated run configuration.

Flower hands an app one flat mapping of dotted keys (`"train.batch-size": 64`) and checks neither
types nor values. `parse` turns it into frozen dataclasses or raises a `ConfigError` that names
every offending key, its value and what is allowed. The defaults and the documentation of every key
live here and nowhere else: `pyproject.toml` and `docs/configuration.md` are checked against them.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from feddm_flwr.presets import MODELS, STRATEGIES, decided
from feddm_flwr.schema import PRESET, ConfigError, KeySpec, Scalar, key, sections

__all__ = ["ConfigError", "RunConfig", "defaults", "derive_seed", "flatten", "local_steps", "parse"]

#: A node's name: it goes into logs, seeds and file names.
NODE_NAME = r"(?!\.)[\w.-]{1,64}"
_RUN_NAME = r"(?!\.)[\w.-]{0,128}"
#: What `codec.uplink` and `codec.downlink` may be, from the most bytes to the fewest.
CODECS = ("none", "fp16", "bf16", "int8", "int4", "int3", "int2", "sign", "topk", "budget")


@dataclass(frozen=True)
class Data:
    """Which images, and how a simulation shares them out. On a real node `data-path` wins."""

    name: str = key(
        "digits",
        "`digits` (scikit-learn's handwritten digits, 8x8, no download), a Hugging Face data set id, "
        "a folder of images, or a parquet file; a relative path starts at the server's folder",
    )
    split: str = key("train", "split of a hub data set or folder that is trained on")
    partition: str = key(
        "iid",
        "how a simulation shares the images among its nodes",
        choices=("iid", "dirichlet", "pathological", "shard", "natural"),
    )
    alpha: float = key(0.3, "concentration of the Dirichlet partition: smaller is more skewed", above=0)
    classes_per_node: int = key(2, "classes a node holds in the pathological partition", low=1)
    shards_per_node: int = key(2, "shards a node holds in the shard partition", low=1)
    natural_column: str = key("", "column whose values are the nodes in the natural partition (patient, site, writer)")
    image_size: int = key(PRESET, "height and width in pixels; images are resized and centre-cropped to it", low=4)
    channels: int = key(PRESET, "1 (grey) or 3 (RGB)", low=1, high=3)
    image_column: str = key(PRESET, "column that holds the images")
    label_column: str = key(PRESET, "column that holds the classes; only partitions need it")
    flip: bool = key(PRESET, "mirror training images left to right at random")
    eval_fraction: float = key(0.1, "share of its images that a node holds out for `eval_loss`", low=0, below=1)
    max_broken: float = key(0.01, "share of a node's images that are skipped where they cannot be read", low=0, below=1)


@dataclass(frozen=True)
class Model:
    """The diffusers `UNet2DModel`."""

    kind: str = key("ddpm", "pixel-space DDPM", choices=("ddpm",))
    preset: str = key("small", "architecture that the keys below start from", choices=(*MODELS,))
    block_channels: tuple[int, ...] = key(PRESET, "channels of each resolution level, finest first")
    attention: tuple[int, ...] = key(PRESET, "1 where a level has self-attention, else 0")
    layers_per_block: int = key(1, "residual blocks per level", low=1)
    attention_head_dim: int = key(32, "channels of an attention head", low=1)
    norm_groups: int = key(8, "groups of each GroupNorm", low=1)
    dropout: float = key(0.0, "dropout rate", low=0, below=1)


@dataclass(frozen=True)
class Diffusion:
    """The forward process and the training target (Ho et al. 2020; Nichol and Dhariwal 2021)."""

    timesteps: int = key(1000, "number of noise levels T", low=2)
    schedule: str = key("cosine", "noise schedule", choices=("linear", "cosine"))
    prediction: str = key("v", "what the U-Net predicts", choices=("epsilon", "v"))
    min_snr_gamma: float = key(
        0.0, "Min-SNR loss weighting (Hang et al. 2023), 5 is usual; 0 weighs all levels alike", low=0
    )


@dataclass(frozen=True)
class Train:
    """What a node does in a round."""

    local_epochs: int = key(0, "passes over a node's images per round; 0: use local-steps", low=0)
    local_steps: int = key(100, "optimizer steps per round; 0: use local-epochs", low=0)
    batch_size: int = key(32, "images per step", low=1)
    learning_rate: float = key(2e-3, "AdamW's step size", above=0)
    lr_schedule: str = key("cosine", "after the warm-up, over the whole run", choices=("constant", "cosine"))
    warmup_steps: int = key(20, "steps of linear warm-up, counted over all rounds", low=0)
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay", low=0)
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm", above=0)
    mu: float = key(PRESET, "weight of the proximal term mu/2 * ||w - w_t||^2", low=0)
    precision: str = key(
        "auto",
        "of the forward pass; auto: bf16 where the processor or GPU computes in it",
        choices=("auto", "fp32", "bf16"),
    )
    max_seconds: float = key(
        0.0, "a node stops after this time and sends what it has (then runs are not repeatable); 0: no limit", low=0
    )
    threads: int = key(0, "CPU threads of a node; 0: 1 in a simulation, every core on a real node", low=0)
    deterministic: bool = key(False, "bit-identical results on a GPU too, at some cost (a CPU always gives them)")


@dataclass(frozen=True)
class Codec:
    """How weights travel."""

    uplink: str = key(PRESET, "coding of what nodes send", choices=CODECS)
    downlink: str = key(PRESET, "coding of what the server sends", choices=CODECS)
    target: str = key(
        PRESET,
        "what is coded: the `weights` themselves (the paper's scheme; no node keeps state), or the `delta`, which is "
        "what changed (preset: delta where codec.uplink or codec.downlink is set)",
        choices=("weights", "delta"),
    )
    error_feedback: bool = key(
        PRESET, "a node's training starts with what the coding of its last delta lost (preset: with delta)"
    )
    residual_decay: float = key(
        PRESET, "share of the lost part that error feedback keeps from round to round", above=0, high=1
    )
    block_size: int = key(256, "values that share a scale", low=8, high=65536)
    clip_search: bool = key(
        False, "int8, int4, int3: per block, the clipping range with the least squared error (slow, costs bytes)"
    )
    stochastic_rounding: bool = key(False, "int8 to sign: round at random and without bias instead of to the nearest")
    topk_share: float = key(0.05, "share of the values that `topk` sends", low=1e-6, high=1)
    topk_bits: int = key(2, "bits of the values that `topk` sends: 2 or 4", low=2, high=4)
    budget_ratio: int = key(82, "times fewer bytes than float32 that `budget` aims at", low=4, high=10_000)

    @property
    def shadow(self) -> bool:
        """Whether server and nodes hold the same weights, to which coded differences are added."""
        return self.target == "delta" and self.downlink != "none"


@dataclass(frozen=True)
class Exchange:
    """Which parameters travel; goes with every codec."""

    parts: str = key(
        "full",
        "`full`: all; after FedDiffuse, `usplit`: of all, each node sends the encoder or the rest, in turns; "
        "`ulatdec`: the encoder stays on the node; `udec`: encoder and bottleneck stay",
        choices=("full", "usplit", "ulatdec", "udec"),
    )
    personal: str = key(
        "", "further parameters that stay on each node: patterns of their names, such as `conv_in.*,*.norm1.*`"
    )


@dataclass(frozen=True)
class Server:
    """What the server does with the averaged update."""

    aggregation: str = key(
        "mean",
        "how updates become one: `mean`, weighted by images; coordinate by coordinate, each node alike, `trimmed-mean` "
        "or `median`, which a few broken or hostile nodes cannot move far",
        choices=("mean", "trimmed-mean", "median"),
    )
    trim_share: float = key(0.2, "share of the values that trimmed-mean drops at either end", above=0, below=0.5)
    norm_limit: float = key(
        10.0, "an update this many times longer than the median of earlier rounds is dropped; 0: none is", low=0
    )
    clip_norm: float = key(
        0.0, "an update this many times longer than the median of earlier rounds is shortened to it; 0: none is", low=0
    )
    optimizer: str = key(PRESET, "rule applied to the averaged update", choices=("averaging", "nesterov", "adam"))
    learning_rate: float = key(PRESET, "server step size", above=0)
    momentum: float = key(PRESET, "momentum of nesterov, beta1 of adam", low=0, below=1)
    ema_decay: float = key(
        0.999, "decay per local step of the averaged weights that are sampled and shipped", low=0, below=1
    )


@dataclass(frozen=True)
class Eval:
    """Held-out denoising loss, computed by the nodes on the weights they receive."""

    every: int = key(1, "rounds between evaluations; 0: never", low=0)
    images: int = key(256, "held-out images a node uses at most", low=1)


@dataclass(frozen=True)
class Sample:
    """The image grids."""

    every: int = key(5, "rounds between grids; the last round always has one, 0: only that", low=0)
    count: int = key(64, "images in a grid", low=1, high=4096)
    steps: int = key(50, "DDIM steps", low=1)


@dataclass(frozen=True)
class RunConfig:
    """One run."""

    strategy: str = key(
        "feddm-vanilla",
        "`feddm-vanilla` averages, `feddm-prox` adds a proximal term, `feddm-quant` exchanges 8-bit weights (these "
        "three are the paper's), `feddm-lean` ternary differences both ways, `feddm-slow-link` even fewer bytes up",
        choices=(*STRATEGIES,),
    )
    num_server_rounds: int = key(20, "rounds of federated training", low=1)
    seed: int = key(0, "everything random derives from it", low=0)
    run_name: str = key("", "folder of the run; empty: strategy and time")
    out_dir: str = key("runs", "folder of all runs, on the server")
    resume: bool = key(False, "go on with the run `run-name` from its newest good checkpoint")
    keep_checkpoints: int = key(2, "checkpoints that are kept, of the newest rounds", low=1)
    fraction_train: float = key(1.0, "share of the nodes that train in a round", above=0, high=1)
    min_nodes: int = key(2, "nodes that must be connected before a round starts", low=1)
    min_replies: int = key(0, "good replies that a round needs; 0: more than half of the nodes that were asked", low=0)
    max_round_retries: int = key(2, "times a round with too few good replies is repeated", low=0)
    round_timeout: float = key(3600.0, "seconds after which a round ends without its stragglers", above=0)
    wait_timeout: float = key(300.0, "seconds to wait for nodes before the run fails", above=0)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    diffusion: Diffusion = field(default_factory=Diffusion)
    train: Train = field(default_factory=Train)
    codec: Codec = field(default_factory=Codec)
    exchange: Exchange = field(default_factory=Exchange)
    server: Server = field(default_factory=Server)
    eval: Eval = field(default_factory=Eval)
    sample: Sample = field(default_factory=Sample)

    @property
    def keeps_personal(self) -> bool:
        """Whether parameters stay on the nodes."""
        return bool(self.exchange.personal) or self.exchange.parts in ("ulatdec", "udec")

    @property
    def keeps_state(self) -> bool:
        """Whether nodes keep files from round to round."""
        return self.codec.shadow or self.codec.error_feedback or self.keeps_personal


KEYS: dict[str, KeySpec] = {spec.name: spec for _, _, specs in sections(RunConfig) for spec in specs}


def defaults() -> dict[str, Scalar]:
    """The raw defaults, as `pyproject.toml` has them."""
    return {name: spec.default for name, spec in KEYS.items()}


def parse(run_config: Mapping[str, object]) -> RunConfig:
    """Validate a flat run configuration; missing keys take their defaults.

    Raises:
        ConfigError: one line for each unknown key, wrong type, wrong value or contradiction.
    """
    problems: list[str] = []
    for name in run_config:
        if name not in KEYS:
            close = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "see docs/configuration.md"
            problems.append(f"{name} = {run_config[name]!r}: no such key; {hint}")
    presets = decided(run_config)
    values: dict[str, Any] = {}
    for name, spec in KEYS.items():
        value = run_config.get(name, spec.default)
        if value == PRESET and spec.default == PRESET:
            if name not in presets:
                data = run_config.get("data.name", KEYS["data.name"].default)
                problems.append(f"{name} must be set for data.name = {data!r}: {spec.doc}")
                continue
            value = presets[name]
        try:
            values[name] = spec.convert(value)
        except ConfigError as error:
            problems.append(str(error))
    if not problems:
        config = _build(values)
        problems = list(_contradictions(config))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _build(values: Mapping[str, Any]) -> RunConfig:
    parts: dict[str, Any] = {}
    for prefix, cls, specs in sections(RunConfig):
        own = {s.name.removeprefix(prefix).replace("-", "_"): values[s.name] for s in specs}
        if prefix:
            parts[prefix[:-1]] = cls(**own)
        else:
            parts.update(own)
    return RunConfig(**parts)


def _contradictions(c: RunConfig) -> Iterator[str]:
    """Combinations that cannot work, one line each."""
    if (c.train.local_epochs > 0) == (c.train.local_steps > 0):
        yield (
            f"train.local-epochs = {c.train.local_epochs} and train.local-steps = {c.train.local_steps}: "
            "exactly one of them must be above 0"
        )
    if not re.fullmatch(_RUN_NAME, c.run_name):
        yield f"run-name = {c.run_name!r} is not allowed: must be letters, digits, '_', '-' or '.', not first"
    if c.strategy == "feddm-prox" and c.train.mu == 0:
        yield "train.mu = 0.0 with strategy = 'feddm-prox': must be above 0, or use feddm-vanilla"
    if c.strategy != "feddm-prox" and c.train.mu > 0:
        yield f"train.mu = {c.train.mu} with strategy = {c.strategy!r}: must be 0, or use feddm-prox"
    if c.strategy == "feddm-vanilla" and (c.codec.uplink, c.codec.downlink) != ("none", "none"):
        yield (
            f"codec.uplink = {c.codec.uplink!r}, codec.downlink = {c.codec.downlink!r} with "
            "strategy = 'feddm-vanilla': both must be none, or use feddm-quant"
        )
    if c.codec.error_feedback and (c.codec.target == "weights" or c.codec.uplink == "none"):
        yield (
            f"codec.error-feedback = true with codec.target = {c.codec.target!r}, codec.uplink = {c.codec.uplink!r}: "
            "must be false; only a coded delta leaves something to feed back"
        )
    if c.codec.residual_decay < 1 and not c.codec.error_feedback:
        yield f"codec.residual-decay = {c.codec.residual_decay} with codec.error-feedback = false: must be 1"
    if c.codec.clip_search and c.codec.stochastic_rounding:
        yield "codec.clip-search = true with codec.stochastic-rounding = true: clipping is biased; choose one"
    sparse = {"topk", "budget"} & {c.codec.uplink, c.codec.downlink}
    if sparse and c.codec.target == "weights":
        yield f"codec.target = 'weights' with {sorted(sparse)[0]!r}: most weights would become 0; must be delta"
    if c.codec.topk_bits == 3:
        yield "codec.topk-bits = 3 is not allowed: must be 2 or 4"
    if c.strategy not in ("feddm-vanilla", "feddm-prox") and (c.codec.uplink, c.codec.downlink) == ("none", "none"):
        yield f"codec.uplink = 'none', codec.downlink = 'none' with strategy = {c.strategy!r}: use feddm-vanilla"
    if c.data.channels == 2:
        yield "data.channels = 2 is not allowed: must be 1 (grey) or 3 (RGB)"
    if c.data.partition == "natural" and not c.data.natural_column:
        yield "data.natural-column = '' with data.partition = 'natural': must name a column"
    if c.resume and not c.run_name:
        yield "run-name = '' with resume = true: must name the run to go on with"
    if c.server.aggregation != "mean" and c.codec.uplink in ("topk", "budget"):
        yield (
            f"server.aggregation = {c.server.aggregation!r} with codec.uplink = {c.codec.uplink!r}: must be mean; "
            "most values of such an update are 0, and so would be the median"
        )
    stride = 2 ** (len(c.model.block_channels) - 1)
    if c.data.image_size % stride:
        yield (
            f"data.image-size = {c.data.image_size} is not divisible by {stride}, the total stride of "
            f"model.block-channels = {_text(c.model.block_channels)!r}: "
            f"use a multiple of {stride} or fewer levels"
        )
    if len(c.model.attention) != len(c.model.block_channels) or not set(c.model.attention) <= {0, 1}:
        yield (
            f"model.attention = {_text(c.model.attention)!r} is not allowed: must be 0 or 1 for each of "
            f"the {len(c.model.block_channels)} levels of model.block-channels"
        )
    for width in c.model.block_channels:
        if width == 0 or width % c.model.norm_groups:
            yield (
                f"model.block-channels = {_text(c.model.block_channels)!r} is not allowed: "
                f"each must be a multiple of model.norm-groups = {c.model.norm_groups}"
            )
            break
    # The middle of a diffusers U-Net has attention at the width of the last level.
    attending = [w for w, on in zip(c.model.block_channels, c.model.attention, strict=False) if on]
    for width in (*attending, c.model.block_channels[-1]):
        if width % c.model.attention_head_dim:
            yield (
                f"model.attention-head-dim = {c.model.attention_head_dim} is not allowed: "
                f"must divide the {width} channels of a level with attention (the last level always has it)"
            )
            break
    if c.sample.steps > c.diffusion.timesteps:
        yield (
            f"sample.steps = {c.sample.steps} is not allowed: "
            f"must be at most diffusion.timesteps = {c.diffusion.timesteps}"
        )


def _text(value: object) -> Scalar:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    assert isinstance(value, bool | int | float | str)
    return value


def flatten(config: RunConfig) -> dict[str, Scalar]:
    """The resolved configuration as dotted keys; `parse(flatten(c)) == c`."""
    flat: dict[str, Scalar] = {}
    for prefix, _, specs in sections(RunConfig):
        part = getattr(config, prefix[:-1]) if prefix else config
        for spec in specs:
            flat[spec.name] = _text(getattr(part, spec.name.removeprefix(prefix).replace("-", "_")))
    return flat


def local_steps(config: RunConfig, images: int) -> int:
    """How many optimizer steps a node with that many training images takes in a round."""
    return config.train.local_steps or config.train.local_epochs * -(-images // config.train.batch_size)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything with a stable text, such as `(seed, node name, round)`."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
