"""The whole run configuration: the keys of the run itself, and the sections.

`pyproject.toml` and `docs/configuration.md` are checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from feddm_flwr.config.data import Data
from feddm_flwr.config.fields import KeySpec, key, sections
from feddm_flwr.config.keys import Autoencoder, Codec, Diffusion, Eval, Exchange, Finish, Model, Sample, Server, Train
from feddm_flwr.config.presets import STRATEGIES
from feddm_flwr.config.privacy import Privacy


@dataclass(frozen=True)
class RunConfig:
    """One run."""

    strategy: str = key(
        "feddm-vanilla",
        "`feddm-vanilla` averages, `feddm-prox` adds a proximal term, `feddm-quant` exchanges 8-bit weights (these "
        "three are the paper's), `feddm-lean` ternary differences both ways, of steps by Muon, `feddm-slow-link` even "
        "fewer bytes up, `feddm-secure` is feddm-lean with privacy.secure-aggregation",
        choices=(*STRATEGIES,),
    )
    stage: str = key(
        "diffusion",
        "what is trained: the `diffusion` model, or the `autoencoder` whose latents a latent one works on",
        choices=("diffusion", "autoencoder"),
    )
    num_server_rounds: int = key(20, "rounds of federated training", low=1)
    seed: int = key(0, "everything random derives from it", low=0, high=2**63 - 1)
    run_name: str = key("", "folder of the run; empty: strategy and time")
    out_dir: str = key("runs", "folder of all runs, on the server")
    resume: bool = key(False, "go on with the run `run-name` from its newest good checkpoint")
    keep_checkpoints: int = key(2, "checkpoints that are kept, of the newest rounds", low=1)
    fraction_train: float = key(1.0, "share of the nodes that train in a round", above=0, high=1)
    min_nodes: int = key(2, "nodes that must be connected before a round starts", low=1)
    min_replies: int = key(
        0,
        "good replies that a round needs; 0: from more than half of those asked, and three under a robust rule or with "
        "secure-aggregation",
        low=0,
    )
    max_round_retries: int = key(2, "times a round with too few good replies is repeated", low=0)
    round_timeout: float = key(3600.0, "seconds after which a round ends without its stragglers", above=0)
    tracker: str = key(
        "none",
        "where figures and grids go beside the run's folder and TensorBoard: Weights & Biases, MLflow",
        choices=("none", "wandb", "mlflow"),
        plugin=True,
    )
    wait_timeout: float = key(300.0, "seconds to wait for nodes before the run fails", above=0)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    autoencoder: Autoencoder = field(default_factory=Autoencoder)
    diffusion: Diffusion = field(default_factory=Diffusion)
    train: Train = field(default_factory=Train)
    finish: Finish = field(default_factory=Finish)
    codec: Codec = field(default_factory=Codec)
    exchange: Exchange = field(default_factory=Exchange)
    server: Server = field(default_factory=Server)
    eval: Eval = field(default_factory=Eval)
    sample: Sample = field(default_factory=Sample)
    privacy: Privacy = field(default_factory=Privacy)

    @property
    def before_finish(self) -> int:
        """The rounds before those of the finish; all where there is none."""
        return self.num_server_rounds - self.finish.rounds

    def in_round(self, number: int) -> RunConfig:
        """Returns what holds in a round, counted from 1: in those of the finish, nodes train otherwise."""
        if number <= self.before_finish:
            return self
        train = replace(
            self.train,
            optimizer="adamw",
            moments="server",
            alignment=0.0,
            control="none",
            local_epochs=0,
            local_steps=self.finish.local_steps,
            learning_rate=self.finish.learning_rate,
        )
        return replace(self, train=train)

    @property
    def taught_classes(self) -> tuple[str, ...]:
        """The classes that the U-Net is told, by label; none where it is told none."""
        return self.data.class_names if self.model.class_conditional else ()

    @property
    def keeps_personal(self) -> bool:
        """Whether parameters stay on the nodes."""
        return bool(self.exchange.personal) or self.exchange.parts in ("ulatdec", "udec")

    @property
    def keeps_state(self) -> bool:
        """Whether nodes keep files from round to round."""
        of_training = self.train.alignment > 0 or self.train.moments == "node" or self.train.control != "none"
        return self.codec.shadow or self.codec.error_feedback or self.keeps_personal or of_training


KEYS: dict[str, KeySpec] = {spec.name: spec for _, _, specs in sections(RunConfig) for spec in specs}
