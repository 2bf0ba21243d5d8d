"""Combinations of run-config keys that cannot work."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from feddm_flwr.config.data import about_data
from feddm_flwr.config.names import CODECS, FLOW_SCHEDULERS, LEAST_OF_SUM, PARTITION_OF, SCHEDULERS, SPARSE_CODECS, SUM
from feddm_flwr.config.plugins import is_plugin
from feddm_flwr.config.presets import EMA_DECAY
from feddm_flwr.config.privacy import LEAST_NOISE
from feddm_flwr.config.run_config import KEYS, RunConfig

_LEAST_LINEAR = 500  # with as many, 8 % of the signal are left at the end
_CLIPPED = {"int8", "int4", "int3"}
_GRIDS = _CLIPPED | {"int2", "sign"}
_BLOCKS = _GRIDS | {"topk", SUM}
_RUN_NAME = r"(?!\.)[\w.-]{0,128}"


def problems(c: RunConfig) -> Iterator[str]:
    """Yields one line for each combination of keys that cannot work."""
    for section in (_run, _train, _codecs, _data, _diffusion, _server, _privacy, _sums, _without_effect, _models):
        yield from section(c)


def _run(c: RunConfig) -> Iterator[str]:
    if not re.fullmatch(_RUN_NAME, c.run_name):
        yield f"run-name = {c.run_name!r} is not allowed: must be at most 128 letters, digits, _, - or ., not first"
    if c.resume and not c.run_name:
        yield "run-name = '' with resume = true: must name the run to go on with"


def _train(c: RunConfig) -> Iterator[str]:
    if (c.train.local_epochs > 0) == (c.train.local_steps > 0):
        yield (
            f"train.local-epochs = {c.train.local_epochs} and train.local-steps = {c.train.local_steps}: "
            "exactly one of them must be above 0"
        )
    if c.train.compile and c.train.deterministic:
        yield "train.compile = true with train.deterministic = true: must be false; kernels are chosen by their speed"
    yield from _finish(c)
    if c.strategy == "feddm-prox" and c.train.mu == 0:
        yield "train.mu = 0.0 with strategy = 'feddm-prox': must be above 0, or use feddm-vanilla"
    if c.strategy != "feddm-prox" and c.train.mu > 0:
        yield f"train.mu = {c.train.mu} with strategy = {c.strategy!r}: must be 0, or use feddm-prox"


def _finish(c: RunConfig) -> Iterator[str]:
    if not c.finish.rounds:
        return
    rounds = f"finish.rounds = {c.finish.rounds}"
    if c.finish.rounds > c.num_server_rounds:
        yield f"{rounds} with num-server-rounds = {c.num_server_rounds}: must be at most as many; it has them in it"
    if c.privacy.mechanism != "none":
        yield f"{rounds} with privacy.mechanism = {c.privacy.mechanism!r}: must be 0; all rounds are accounted alike"
    if c.privacy.secure_aggregation:
        yield f"{rounds} with privacy.secure-aggregation = true: must be 0; nodes would tell second moments one by one"


def _codecs(c: RunConfig) -> Iterator[str]:
    if c.strategy == "feddm-vanilla" and (c.codec.uplink, c.codec.downlink) != ("none", "none"):
        sums = "" if c.codec.uplink != SUM else "; with privacy.secure-aggregation = true use feddm-secure"
        yield (
            f"codec.uplink = {c.codec.uplink!r}, codec.downlink = {c.codec.downlink!r} with "
            f"strategy = 'feddm-vanilla': both must be none, or use feddm-quant{sums}"
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
    fed_back = {c.codec.uplink} if c.codec.error_feedback else set[str]()
    coarse = {"int2", "sign"} & (fed_back | ({c.codec.downlink} if c.codec.shadow else set()))
    if c.codec.stochastic_rounding and coarse:
        yield (
            f"codec.stochastic-rounding = true with {sorted(coarse)[0]!r} and codec.target = 'delta': must be false; "
            "its errors are larger than what is coded, and would add up from round to round"
        )
    yield from about_sparse_codecs(c, SPARSE_CODECS)
    if c.codec.topk_bits == 3:
        yield "codec.topk-bits = 3 is not allowed: must be 2 or 4"
    if c.strategy not in ("feddm-vanilla", "feddm-prox") and (c.codec.uplink, c.codec.downlink) == ("none", "none"):
        yield f"codec.uplink = 'none', codec.downlink = 'none' with strategy = {c.strategy!r}: use feddm-vanilla"


def _data(c: RunConfig) -> Iterator[str]:
    yield from about_data(c.data)


def _diffusion(c: RunConfig) -> Iterator[str]:
    if (c.diffusion.prediction, c.diffusion.schedule) == ("epsilon", "cosine") and not c.model.init_from:
        yield (
            "diffusion.prediction = 'epsilon' with diffusion.schedule = 'cosine': its noisiest level magnifies errors "
            "of the network a thousandfold; use v, or the linear schedule"
        )
    d = c.diffusion
    if d.schedule == "linear" and d.prediction != "flow" and d.timesteps < _LEAST_LINEAR and not c.model.init_from:
        yield (
            f"diffusion.timesteps = {d.timesteps} with diffusion.schedule = 'linear': must be at least "
            f"{_LEAST_LINEAR}, or the last level is not noise, which samples begin from; cosine goes with any number"
        )
    flow = d.prediction == "flow"
    if (c.sample.scheduler in FLOW_SCHEDULERS) is not flow:
        allowed = " or ".join(FLOW_SCHEDULERS if flow else SCHEDULERS)
        yield (
            f"sample.scheduler = {c.sample.scheduler!r} with diffusion.prediction = {d.prediction!r}: must be {allowed}"
        )
    if c.sample.steps > c.diffusion.timesteps:
        yield (
            f"sample.steps = {c.sample.steps} is not allowed: "
            f"must be at most diffusion.timesteps = {c.diffusion.timesteps}"
        )


def _server(c: RunConfig) -> Iterator[str]:
    if c.server.robust and c.exchange.parts == "usplit":
        yield (
            f"server.aggregation = {c.server.aggregation!r} with exchange.parts = 'usplit': must be mean; "
            "of the few replies with a part, nothing could be left out"
        )
    if c.server.robust and c.min_replies in (1, 2):
        yield (
            f"min-replies = {c.min_replies} with server.aggregation = {c.server.aggregation!r}: must be 0 or at least "
            "3; of two replies none can be left out"
        )


def _privacy(c: RunConfig) -> Iterator[str]:
    p = c.privacy
    on = f"privacy.mechanism = {p.mechanism!r}"
    if 0 < p.canaries < 20:
        yield f"privacy.canaries = {p.canaries}: must be 0 or at least 20; fewer prove nothing"
    for key, wrong in (("stage", c.stage == "autoencoder"), ("exchange.*", c.keeps_personal)):
        if p.canaries and wrong:
            yield f"privacy.canaries = {p.canaries} with {key}: the server has no diffusion model to look into"
    if 0 < p.noise_multiplier < LEAST_NOISE:
        yield f"privacy.noise-multiplier = {p.noise_multiplier:g}: must be 0 or at least {LEAST_NOISE}"
    if p.mechanism != "none" and not p.noise_multiplier and not p.epsilon:
        yield f"privacy.noise-multiplier = 0.0, privacy.epsilon = 0.0 with {on}: one of them must be above 0"
    yield from _private_images(c, on) if p.of_images else _private_nodes(c, on) if p.of_nodes else ()
    if p.hides_figures:
        yield from _hidden_figures(c)


def _private_images(c: RunConfig, on: str) -> Iterator[str]:
    for key, value in (("train.compile", c.train.compile), ("train.checkpointing", c.train.checkpointing)):
        if value:
            yield f"{key} = true with {on}: must be false; the gradient of each image is found by another way"
    if c.train.max_seconds:
        yield f"train.max-seconds = {c.train.max_seconds:g} with {on}: must be 0; it tells how many images were drawn"


def _hidden_figures(c: RunConfig) -> Iterator[str]:
    told = "privacy.figures = 'none'"
    if c.eval.features != "none":
        yield f"eval.features = {c.eval.features!r} with {told}: nodes give no sums of features; must be none"
    if c.eval.average_by == "loss":
        yield f"eval.average-by = 'loss' with {told}: nodes tell no held-out loss; must be none or fid"
    if c.eval.utility:
        yield f"eval.utility = true with {told}: nodes tell no counts of what is right; must be false"
    if c.stage == "autoencoder":
        yield f"stage = 'autoencoder' with {told}: the scale of the latents is told by the nodes"


def _private_nodes(c: RunConfig, on: str) -> Iterator[str]:
    """What else of a node would enter the model, beside its clipped update."""
    for key, value, needed in (
        ("server.aggregation", c.server.aggregation, "mean"),
        ("exchange.parts", c.exchange.parts, "full"),
        ("train.moments", c.train.moments, "reset"),
        ("train.control", c.train.control, "none"),
        ("train.local-epochs", c.train.local_epochs, 0),
        ("train.max-seconds", c.train.max_seconds, 0.0),
        ("server.clip-norm", c.server.clip_norm, 0.0),
        ("eval.keep-best", c.eval.keep_best, "none"),
        ("stage", c.stage, "diffusion"),
    ):
        if value != needed:
            yield f"{key} = {value!r} with {on}: must be {needed!r}"
    if c.eval.average_by == "loss" or (c.eval.features != "none" and c.eval.average_by == "fid"):
        yield f"eval.average-by = {c.eval.average_by!r} with {on}: the nodes' images would choose; must be 'none'"


def _sums(c: RunConfig) -> Iterator[str]:
    """What the server cannot do, or would learn, where it learns sums only."""
    p, on = c.privacy, "privacy.secure-aggregation = true"
    if (c.codec.uplink == SUM) is not p.secure_aggregation:
        yield (
            f"codec.uplink = {c.codec.uplink!r} with privacy.secure-aggregation = "
            f"{str(p.secure_aggregation).lower()}: 'sum' and true go together"
        )
    if not p.secure_aggregation:
        return
    for key, value, needed in (
        ("codec.target", c.codec.target, "delta"),
        ("codec.error-feedback", c.codec.error_feedback, True),
        ("server.aggregation", c.server.aggregation, "mean"),
        ("server.norm-limit", c.server.norm_limit, KEYS["server.norm-limit"].default),
        ("server.clip-norm", c.server.clip_norm, 0.0),
        ("exchange.parts", c.exchange.parts, "full"),
        ("train.moments", c.train.moments, "reset"),
        ("train.control", c.train.control, "none"),
    ):
        if value != needed:
            yield f"{key} = {value!r} with {on}: must be {needed!r}; no update is seen by itself"
    if p.of_nodes:
        yield f"privacy.mechanism = 'dp-fedavg' with {on}: the server clips no update that it does not see"
    if 0 < c.min_replies < LEAST_OF_SUM:
        yield f"min-replies = {c.min_replies} with {on}: must be 0 or at least 3; of two, each sees the other's"


def about_sparse_codecs(c: RunConfig, sparse: Collection[str]) -> Iterator[str]:
    """Yields what cannot work with those of the run's codecs that are `sparse`."""
    for name in sorted({c.codec.uplink, c.codec.downlink} & {*sparse}):
        if c.codec.target == "weights":
            yield f"codec.target = 'weights' with {name!r}: most weights would become 0; must be delta"
    if c.server.robust and c.codec.uplink in sparse:
        yield (
            f"server.aggregation = {c.server.aggregation!r} with codec.uplink = {c.codec.uplink!r}: must be mean; "
            "most values of such an update are 0, and so would be the median"
        )


def _without_effect(c: RunConfig) -> Iterator[str]:
    """Yields keys that a user set for nothing: what was meant is another run."""
    d = c.diffusion
    partition, rule = f"data.partition = {c.data.partition!r}", f"server.aggregation = {c.server.aggregation!r}"
    coded = {c.codec.uplink, c.codec.downlink}
    if any(map(is_plugin, coded)):  # which may have any of the options
        coded = {*CODECS}
    codecs = f"codec.uplink = {c.codec.uplink!r}, codec.downlink = {c.codec.downlink!r}"
    unprotected = f"privacy.mechanism = {c.privacy.mechanism!r}"
    finishes = c.finish.rounds > 0
    taught, classes = c.model.class_conditional, f"model.class-conditional = {str(c.model.class_conditional).lower()}"
    for name, given, acts, state, where in (
        *(
            (
                name,
                getattr(c.data, name.removeprefix("data.").replace("-", "_")),
                c.data.partition == kind,
                partition,
                repr(kind),
            )
            for name, kind in PARTITION_OF.items()
        ),
        ("codec.clip-search", c.codec.clip_search, bool(coded & _CLIPPED), codecs, "int8, int4 or int3"),
        ("codec.stochastic-rounding", c.codec.stochastic_rounding, bool(coded & _GRIDS), codecs, "int8 to sign"),
        ("codec.block-size", c.codec.block_size, bool(coded & _BLOCKS), codecs, "int8 to sign, topk and sum"),
        ("codec.topk-share", c.codec.topk_share, "topk" in coded, codecs, "'topk'"),
        ("codec.topk-bits", c.codec.topk_bits, "topk" in coded, codecs, "'topk'"),
        ("codec.sum-share", c.codec.sum_share, SUM in coded, codecs, "'sum'"),
        ("privacy.threshold", c.privacy.threshold, c.privacy.secure_aggregation, "secure-aggregation = false", "true"),
        ("codec.budget-ratio", c.codec.budget_ratio, "budget" in coded, codecs, "'budget'"),
        ("diffusion.schedule", d.schedule, d.prediction != "flow", "diffusion.prediction = 'flow'", "epsilon and v"),
        ("model.lora-targets", c.model.lora_targets, c.model.lora_rank > 0, "model.lora-rank = 0", "a rank above 0"),
        ("train.class-dropout", c.train.class_dropout, taught, classes, "true"),
        ("finish.local-steps", c.finish.local_steps, finishes, "finish.rounds = 0", "finish.rounds above 0"),
        ("finish.learning-rate", c.finish.learning_rate, finishes, "finish.rounds = 0", "finish.rounds above 0"),
        ("sample.guidance", c.sample.guidance, taught, classes, "true"),
        *(
            (f"privacy.{name}", getattr(c.privacy, name.replace("-", "_")), acts, unprotected, where)
            for names, acts, where in (
                (
                    ("clip-norm", "noise-multiplier", "epsilon", "delta"),
                    c.privacy.mechanism != "none",
                    "dp-sgd and dp-fedavg",
                ),
                (("multiplicity",), c.privacy.of_images, "'dp-sgd'"),
                (("figures",), c.privacy.of_images or c.privacy.secure_aggregation, "'dp-sgd', or secure-aggregation,"),
            )
            for name in names
        ),
        ("server.weights", c.server.weights, c.server.aggregation == "mean", rule, "'mean'"),
        ("server.trim-share", c.server.trim_share, c.server.aggregation == "trimmed-mean", rule, "'trimmed-mean'"),
    ):
        if not acts and given != KEYS[name].default:
            shown = str(given).lower() if isinstance(given, bool) else repr(given)
            yield f"{name} = {shown} with {state}: acts with {where} only"
    if c.train.moments != "reset" and not c.train.has_moments:
        yield f"train.moments = {c.train.moments!r} with train.optimizer = {c.train.optimizer!r}: is for adamw and muon"
    if c.eval.average_by == "loss":
        for key, value, wrong in (
            ("server.average", c.server.average, c.server.average != "power"),
            ("data.eval-fraction", c.data.eval_fraction, c.data.eval_fraction == 0),
            ("exchange.personal", c.exchange.personal, bool(c.exchange.personal)),
            ("exchange.parts", c.exchange.parts, c.exchange.parts in ("ulatdec", "udec")),
        ):
            if wrong:
                yield f"eval.average-by = 'loss' with {key} = {value!r}: the server has no averages to compare by it"
    if c.server.average == "power" and c.server.ema_decay != EMA_DECAY:
        yield f"server.ema-decay = {c.server.ema_decay} with server.average = 'power': acts with 'exponential' only"
    if c.server.momentum and c.server.optimizer == "averaging":
        yield f"server.momentum = {c.server.momentum} with server.optimizer = 'averaging': must be 0, or use nesterov"


def _models(c: RunConfig) -> Iterator[str]:
    if c.model.resnet_resampling and not any(c.model.attention):
        yield "model.resnet-resampling = true with no attention in model.attention: acts on levels with attention only"
    trains_autoencoder = c.stage == "autoencoder"
    if c.model.class_conditional and not c.data.class_names:
        yield "data.classes = '' with model.class-conditional = true: must name all classes, such as \"cat,dog\""
    if len({*c.data.class_names}) < len(c.data.class_names):
        yield f"data.classes = {c.data.classes!r} is not allowed: a name is there twice"
    if c.model.kind == "ldm" and not c.model.autoencoder and not trains_autoencoder:
        yield (
            "model.autoencoder = '' with model.kind = 'ldm': must be a diffusers folder or hub id of an AutoencoderKL; "
            'train one on the nodes with stage = "autoencoder"'
        )
    if c.model.autoencoder and (c.model.kind != "ldm" or trains_autoencoder):
        yield f"model.autoencoder = {c.model.autoencoder!r}: must be '' but for model.kind = 'ldm', stage = 'diffusion'"
    if c.autoencoder.perceptual and not trains_autoencoder:
        yield f"autoencoder.perceptual = {c.autoencoder.perceptual!r}: is for stage = 'autoencoder' only"
    if trains_autoencoder:
        for key, value in (
            ("model.class-conditional", c.model.class_conditional),
            ("model.init-from", c.model.init_from),
            ("exchange.personal", c.exchange.personal),
        ):
            if value:
                yield f"{key} = {value!r} with stage = 'autoencoder': is for stage = 'diffusion'"
        if c.exchange.parts != "full":
            yield f"exchange.parts = {c.exchange.parts!r} with stage = 'autoencoder': must be full"
    e = c.eval
    if e.features == "none" and (e.keep_best != "none" or e.audit):
        key = "eval.audit = true" if e.audit else f"eval.keep-best = {e.keep_best!r}"
        yield f"{key} with eval.features = 'none': needs a network to compare images by; choose one"
    if e.features != "none" and (trains_autoencoder or c.keeps_personal):
        yield f"eval.features = {e.features!r}: the server draws no samples in such a run; must be none"
    if e.features_from and e.features != "dinov2":
        yield f"eval.features-from = {e.features_from!r} with eval.features = {e.features!r}: is for dinov2 only"
    if e.keep_best == "kid" and e.features in ("dinov2", "inception"):
        yield f"eval.keep-best = 'kid' with eval.features = {e.features!r}: their KID takes images; use fid"
    if e.utility and (not c.model.class_conditional or c.keeps_personal):
        yield "eval.utility = true: needs a whole model with classes: model.class-conditional = true, nothing personal"
    if c.data.eval_fraction == 0 and (e.audit or e.utility or trains_autoencoder):
        why = "eval.audit = true" if e.audit else "eval.utility = true" if e.utility else "stage = 'autoencoder'"
        yield f"data.eval-fraction = 0.0 with {why}: needs held-out images; must be above 0"
    if c.model.lora_rank and (not c.model.init_from or c.exchange.parts != "full" or c.exchange.personal):
        yield (
            f"model.lora-rank = {c.model.lora_rank}: needs model.init-from, a model to adapt; exchange.parts must be "
            "full and exchange.personal empty"
        )
    if trains_autoencoder:
        yield from _widths("autoencoder", c.autoencoder.block_channels, c.autoencoder.norm_groups)
        yield from _stride("autoencoder", c.autoencoder.block_channels, c.data.image_size)
    elif not c.model.init_from:
        yield from _unet(c)


def _stride(section: str, channels: tuple[int, ...], size: int) -> Iterator[str]:
    stride = 2 ** (len(channels) - 1)
    if size % stride:
        yield (
            f"data.image-size = {size} is not divisible by {stride}, the total stride of "
            f"{section}.block-channels = {_listed(channels)!r}: use a multiple of {stride} or fewer levels"
        )


def _widths(section: str, channels: tuple[int, ...], groups: int) -> Iterator[str]:
    if any(width == 0 or width % groups for width in channels):
        yield (
            f"{section}.block-channels = {_listed(channels)!r} is not allowed: "
            f"each must be a multiple of {section}.norm-groups = {groups}"
        )


def _unet(c: RunConfig) -> Iterator[str]:
    if c.model.kind == "ddpm":  # else the size of the latents decides, see `models.networks`
        yield from _stride("model", c.model.block_channels, c.data.image_size)
    if len(c.model.attention) != len(c.model.block_channels) or not set(c.model.attention) <= {0, 1}:
        yield (
            f"model.attention = {_listed(c.model.attention)!r} is not allowed: must be 0 or 1 for each of "
            f"the {len(c.model.block_channels)} levels of model.block-channels"
        )
    yield from _widths("model", c.model.block_channels, c.model.norm_groups)
    # The middle of a diffusers U-Net has attention at the width of the last level.
    attending = [w for w, on in zip(c.model.block_channels, c.model.attention, strict=False) if on]
    for width in (*attending, c.model.block_channels[-1]):
        if c.model.attention_head_dim and width % c.model.attention_head_dim:
            yield (
                f"model.attention-head-dim = {c.model.attention_head_dim} is not allowed: "
                f"must divide the {width} channels of a level with attention (the last level always has it)"
            )
            break


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
