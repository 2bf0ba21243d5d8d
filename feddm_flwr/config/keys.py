"""The keys of each section of the run configuration: default, bounds and documentation, here and nowhere else.

Those of the run itself are in `config.run_config`.
`pyproject.toml` and `docs/configuration.md` are checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from feddm_flwr.config.fields import PRESET, key
from feddm_flwr.config.names import CODECS, FLOW_SCHEDULERS, SCHEDULERS, SUM
from feddm_flwr.config.presets import MODELS


@dataclass(frozen=True)
class Model:
    """The diffusers `UNet2DModel`."""

    kind: str = key("ddpm", "`ddpm`: on pixels; `ldm`: on the latents of model.autoencoder", choices=("ddpm", "ldm"))
    preset: str = key("small", "architecture that the keys below start from", choices=(*MODELS,))
    class_conditional: bool = key(False, "the U-Net is told the class of an image (data.label-column, data.classes)")
    autoencoder: str = key(
        "",
        "for ldm: diffusers folder or hub id of an `AutoencoderKL`, such as the model/ of a run with "
        'stage = "autoencoder"; the server reads it and sends it to the nodes',
    )
    init_from: str = key(
        "",
        "diffusers folder or hub id of a `UNet2DModel` to fine-tune; it decides the architecture; empty: from scratch",
    )
    lora_rank: int = key(0, "fine-tune, and send, low-rank adapters of this rank only; 0: all parameters", low=0)
    lora_targets: str = key("to_q,to_k,to_v,to_out.0", "ends of the names of the layers that get an adapter")
    block_channels: tuple[int, ...] = key(PRESET, "channels of each resolution level, finest first")
    attention: tuple[int, ...] = key(PRESET, "1 where a level has self-attention, else 0")
    layers_per_block: int = key(PRESET, "residual blocks per level", low=1)
    attention_head_dim: int = key(PRESET, "channels of an attention head; 0: one head", low=0)
    norm_groups: int = key(PRESET, "groups of each GroupNorm", low=1)
    dropout: float = key(PRESET, "dropout rate", low=0, below=1)
    time_scale_shift: bool = key(PRESET, "the time step scales and shifts features instead of being added to them")
    resnet_resampling: bool = key(
        PRESET, "levels with attention are joined by residual blocks instead of single convolutions"
    )


@dataclass(frozen=True)
class Autoencoder:
    """The diffusers `AutoencoderKL` of stage = "autoencoder" (Rombach et al. 2022)."""

    block_channels: tuple[int, ...] = key(PRESET, "channels of each level, finest first; each halves the size but one")
    layers_per_block: int = key(PRESET, "residual blocks per level", low=1)
    norm_groups: int = key(PRESET, "groups of each GroupNorm", low=1)
    latent_channels: int = key(4, "channels of the latents", low=1)
    kl_weight: float = key(1e-4, "weight of the KL term, mean over the latents, beside the mean absolute error", low=0)
    perceptual: str = key(
        "",
        "VGG16 whose features are compared in addition: a safetensors file, or a hub id such as timm/vgg16.tv_in1k; "
        "the server reads it and sends it to the nodes",
    )
    perceptual_weight: float = key(1.0, "weight of the perceptual loss", above=0)


@dataclass(frozen=True)
class Diffusion:
    """The forward process and the training target (Ho et al. 2020; Nichol and Dhariwal 2021)."""

    timesteps: int = key(1000, "number of noise levels T", low=2)
    schedule: str = key("cosine", "noise schedule", choices=("linear", "cosine"))
    prediction: str = key(
        "v",
        "what the U-Net predicts; `flow`: flow matching, straight from images to noise",
        choices=("epsilon", "v", "flow"),
    )
    times: str = key(
        "uniform",
        "which noise levels are trained on: all as often, or most in the middle (Esser et al. 2024)",
        choices=("uniform", "logit-normal"),
    )
    min_snr_gamma: float = key(
        0.0, "Min-SNR loss weighting (Hang et al. 2023), 5 is usual; 0 weighs all levels alike", low=0
    )


@dataclass(frozen=True)
class Train:
    """What a node does in a round."""

    local_epochs: int = key(0, "passes over a node's images per round, with local-steps = 0", low=0)
    local_steps: int = key(100, "optimizer steps per round, with local-epochs = 0", low=0)
    batch_size: int = key(32, "images per step", low=1)
    micro_batch: int = key(
        0,
        "images in memory at a time, gradients are accumulated; 0: all of a step, halved where memory runs out",
        low=0,
    )
    checkpointing: bool = key(False, "gradient checkpointing: less memory, some more time")
    class_dropout: float = key(
        0.1,
        "share of the images whose class is hidden in training, for guidance (Ho and Salimans 2022)",
        low=0,
        below=1,
    )
    objective: str = key(
        "denoising",
        "what is minimized with stage = diffusion: the weighted squared error of the denoiser",
        choices=("denoising",),
        plugin=True,
    )
    optimizer: str = key(
        PRESET,
        "`adamw8bit` keeps its averages in 8 bits (package bitsandbytes): 6 bytes less for each parameter; `muon` "
        "takes steps along the orthogonalized momentum of weights that are matrices (Jordan et al. 2024), and "
        "AdamW's for the others: better in short runs, and not in long ones whose nodes hold different classes; "
        "`sgd` is plain gradient descent, as theory has it (preset: adamw but for some strategies)",
        choices=("adamw", "adamw8bit", "muon", "sgd"),
    )
    moments: str = key(
        "reset",
        "the optimizer's averages: `reset` every round; averaged by the `server`, AdamW's second moments as a mean for "
        "each output channel (kilobytes each way), Muon's momentum in ternary values (as many bytes as int2); or all "
        "kept by each `node`, in a file twice the size of the model",
        choices=("reset", "server", "node"),
    )
    alignment: float = key(
        0.0, "share of the last global step that a node adds along its own (FedAdamW's alpha)", low=0, high=1
    )
    learning_rate: float = key(PRESET, "step size of AdamW; Muon's steps are scaled to be as long", above=0)
    lr_schedule: str = key(
        "cosine", "after the warm-up, over the whole run but for a finish", choices=("constant", "cosine")
    )
    warmup_steps: int = key(20, "steps of linear warm-up, counted over all rounds", low=0)
    weight_decay: float = key(0.0, "decoupled weight decay (of sgd, L2)", low=0)
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm", above=0)
    control: str = key(
        "none",
        "`scaffold`: control variates (Karimireddy et al. 2020) take from each node's gradients what is its own; for "
        "small models: as many float32 bytes again each way, and a file as large as the model on each node",
        choices=("none", "scaffold"),
    )
    mu: float = key(PRESET, "weight of the proximal term mu/2 * ||w - w_t||^2", low=0)
    precision: str = key(
        "auto",
        "of the forward pass; auto: bf16 where the processor or GPU is faster in it",
        choices=("auto", "fp32", "bf16"),
    )
    cuda_graph: bool = key(True, "on a GPU, record a step as a CUDA graph and replay it: the same steps, sooner")
    compile: bool = key(
        False,
        "on a GPU, fuse the network's operations (torch.compile), after a minute or more of compiling in each process",
    )
    max_seconds: float = key(
        0.0, "a node stops after this time and sends what it has (then runs are not repeatable); 0: no limit", low=0
    )
    threads: int = key(0, "CPU threads of a node; 0: 1 in a simulation, every core on a real node", low=0)
    deterministic: bool = key(False, "bit-identical results on a GPU too, at some cost (a CPU always gives them)")

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer has averages of gradients, which another round can go on with."""
        return self.optimizer in ("adamw", "muon")


@dataclass(frozen=True)
class Finish:
    """Short rounds at the end of a run: their mean comes nearer to training on all images together, step by step."""

    rounds: int = key(
        0,
        "the last ones of num-server-rounds, in which nodes take few steps by AdamW with the second moments of all, "
        "whatever [train] has before: mends the mix of what is generated where nodes have different classes; each "
        "takes as many bytes up as any other, and a third more down",
        low=0,
    )
    local_steps: int = key(4, "optimizer steps of such a round", low=1)
    learning_rate: float = key(2e-3, "that of these rounds, whose warm-up and schedule are their own", above=0)


@dataclass(frozen=True)
class Codec:
    """How weights travel."""

    uplink: str = key(
        PRESET,
        "coding of what nodes send; `sum`: digits that add up, for privacy.secure-aggregation",
        choices=(*CODECS, SUM),
        plugin=True,
    )
    downlink: str = key(PRESET, "coding of what the server sends", choices=CODECS, plugin=True)
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
    stochastic_rounding: bool = key(
        False,
        "int8 to sign: round at random and without bias instead of to the nearest (int2 and sign: with target weights)",
    )
    topk_share: float = key(0.05, "share of the values that `topk` sends", low=1e-6, high=1)
    topk_bits: int = key(2, "bits of the values that `topk` sends: 2 or 4", low=2, high=4)
    sum_share: float = key(
        0.45, "share of the blocks that `sum` sends in a round, each as often as any other", low=0.01, high=1
    )
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
        "or `median`, which a few broken or hostile nodes cannot move far, and which take three replies (not with "
        "`topk`, `budget` and `usplit`)",
        choices=("mean", "trimmed-mean", "median"),
        plugin=True,
    )
    weights: str = key(
        "images",
        "what an update weighs in the mean: its node's number of `images`, or all `equal`",
        choices=("images", "equal"),
    )
    trim_share: float = key(
        0.2, "share of the values that trimmed-mean drops at either end, at least one of three", above=0, below=0.5
    )
    norm_limit: float = key(
        10.0, "an update this many times longer than the median of earlier rounds is dropped; 0: none is", low=0
    )
    clip_norm: float = key(
        0.0, "an update this many times longer than the median of earlier rounds is shortened to it; 0: none is", low=0
    )
    optimizer: str = key(
        PRESET, "rule applied to the averaged update", choices=("averaging", "nesterov", "adam"), plugin=True
    )
    learning_rate: float = key(PRESET, "server step size", above=0)
    momentum: float = key(PRESET, "momentum of nesterov, beta1 of adam", low=0, below=1)
    average: str = key(
        PRESET,
        "the averaged weights that are sampled and shipped: two that weigh steps by a `power` of time (EDM2), of which "
        "and of the last weights eval.average-by takes one; or an `exponential` one (preset: with server.ema-decay)",
        choices=("power", "exponential"),
    )
    ema_decay: float = key(PRESET, "decay per local step of an exponential average (preset: 0.999)", low=0, below=1)

    @property
    def robust(self) -> bool:
        """Whether a few nodes cannot move the result far."""
        return self.aggregation != "mean"


@dataclass(frozen=True)
class Eval:
    """Held-out denoising loss, computed by the nodes on the weights they receive, and what `features` compare: FID, KID
    and coverage of the averaged weights' samples against all nodes' images, which stay where they are."""

    every: int = key(
        1,
        "rounds between evaluations; the last round always has one; 0: no held-out loss, and FID of the last only",
        low=0,
    )
    images: int = key(256, "held-out images a node uses at most", low=1)
    features: str = key(
        "none",
        "network whose features are compared; `classifier` is trained on data.name where the server can read it",
        choices=("none", "random", "classifier", "dinov2", "inception"),
    )
    features_from: str = key("", "folder or hub id of dinov2; empty: facebook/dinov2-base")
    samples: int = key(512, "samples that are compared; FID depends on their number", low=16)
    min_images: int = key(
        100,
        "nodes with fewer images, and a node's classes of fewer than a tenth of this, give no sums of features, which "
        "would tell much about them",
        low=0,
    )
    keep_best: str = key(
        "none", "also keep, as best/, the model that was best by this figure", choices=("none", "fid", "kid")
    )
    average_by: str = key(
        "fid",
        "figure by which the shipped average is chosen at the end: `fid`, where features are compared; the nodes' "
        "held-out `loss`, for which three models are sent to every node in full; or `none`: the wider one is taken",
        choices=("none", "fid", "loss"),
    )
    utility: bool = key(
        False,
        "at the end the server trains a classifier on samples alone, and each node counts how many of its held-out "
        "images that gets right, and how many one that it trains on its own images",
    )
    audit: bool = key(
        False, "at the end each node counts samples that are near to its images, and tries to tell these by their loss"
    )


@dataclass(frozen=True)
class Sample:
    """The image grids."""

    every: int = key(5, "rounds between grids; the last round always has one, 0: only that", low=0)
    count: int = key(64, "images in a grid", low=1, high=4096)
    scheduler: str = key(
        PRESET,
        "how samples are drawn: UniPC and DPM-Solver++ need few steps, DDIM more; DDPM is the original, with "
        "sample.steps = 1000; with prediction = flow Euler, or Heun with two evaluations a step (preset: unipc, euler)",
        choices=(*SCHEDULERS, *FLOW_SCHEDULERS),
    )
    steps: int = key(25, "steps of the scheduler", low=1)
    guidance: float = key(2.0, "classifier-free guidance of class-conditional models; 1: none", low=0)
