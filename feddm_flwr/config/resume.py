"""Whether a checkpoint fits the configuration that a run is to go on with."""

from __future__ import annotations

from collections.abc import Mapping

from feddm_flwr.config.fields import ConfigError
from feddm_flwr.config.parsing import flatten, parse
from feddm_flwr.config.run_config import RunConfig

#: Keys that may change when a run is resumed, since the weights do not depend on them.
_FREE = {
    "run-name", "out-dir", "resume", "keep-checkpoints", "min-nodes", "min-replies", "max-round-retries",
    "round-timeout", "wait-timeout", "eval.every", "eval.images", "sample.every", "sample.count", "sample.steps",
    "sample.scheduler", "sample.guidance", "eval.features", "eval.features-from", "eval.samples",
    "eval.min-images", "eval.keep-best", "eval.average-by", "eval.audit", "eval.utility", "tracker",
}  # fmt: skip


def check_same_run(config: RunConfig, before: Mapping[str, object], done: int) -> None:
    """Compares a configuration with the flat one of a checkpoint, of which so many rounds are `done`.

    Raises:
        ConfigError: one line for each key that is not the same and decides what the weights become, or fewer rounds
            are asked for.
    """
    now = flatten(config)
    # Keys that are newer than the run have their defaults.
    # How samples are drawn depends on the process, whose difference is to be told.
    earlier = parse({**before, **{name: now[name] for name in _FREE - {"sample.scheduler"}}})
    before = flatten(earlier)
    # A cosine schedule is made for its number of rounds, but a run may end where it is.
    constant = config.train.lr_schedule == "constant" and not config.finish.rounds
    free = _FREE | ({"num-server-rounds"} if constant or config.num_server_rounds == done else set())
    fits = config.before_finish == earlier.before_finish
    if (unfinished := done <= earlier.before_finish) and fits:  # a finish may come after what was to be the end
        free |= {"num-server-rounds", *(name for name in now if name.startswith("finish."))}
    problems = [
        f"{name} = {now.get(name)!r}: was {before.get(name)!r} in the run to resume, and must stay so"
        for name in sorted({*now, *before} - free)
        if now.get(name) != before.get(name)
    ]
    if config.finish.rounds != earlier.finish.rounds and unfinished and not fits:
        total = earlier.before_finish + config.finish.rounds
        problems.append(f"num-server-rounds = {config.num_server_rounds}: {total} lets that finish come after the rest")
    if config.num_server_rounds < done:
        problems.append(f"num-server-rounds = {config.num_server_rounds}: must be at least {done}, which are done")
    if problems:
        raise ConfigError("\n".join(problems))
