"""The keys of what a node promises about each of its images."""

from __future__ import annotations

from dataclasses import dataclass

from feddm_flwr.config.fields import PRESET, key

#: The least noise multiplier: with less, nothing is hidden, and accounting takes hours.
LEAST_NOISE = 0.2


@dataclass(frozen=True)
class Privacy:
    """Differential privacy: of every image, by its node; or of every node, by the server (docs/privacy.md)."""

    mechanism: str = key(
        "none",
        "`dp-sgd`: a node draws its batches at random, clips the gradient of each image and adds noise to their sum "
        "(Abadi et al. 2016); train.batch-size is then the mean size of a batch. `dp-fedavg`, for many nodes: the "
        "server clips each node's update and adds noise to their mean (McMahan et al. 2018). No such run repeats "
        "another's bits",
        choices=("none", "dp-sgd", "dp-fedavg"),
    )
    clip_norm: float = key(
        1.0, "norm that the gradient of each image, or the update of each node, is clipped to", low=1e-6, high=1e6
    )
    noise_multiplier: float = key(
        0.0, "standard deviation of the noise over clip-norm; 0: the least that epsilon allows", low=0, high=1e4
    )
    epsilon: float = key(
        0.0,
        "the most that is spent in this run, which ends when too few nodes have some left; 0: no limit",
        low=0,
        high=100,
    )
    delta: float = key(
        1e-5,
        "of (epsilon, delta)-privacy: well below 1 over the number of a node's images, or of the nodes",
        above=0,
        below=1,
    )
    multiplicity: int = key(
        1, "noise levels that the gradient of an image is the mean of, before it is clipped (DPDM)", low=1
    )
    secure_aggregation: bool = key(
        PRESET,
        "the server learns the sum of the nodes' updates and losses, and nothing of any node but its number of images "
        "and steps (Bonawitz et al. 2017); codec.uplink is `sum` then (preset: with feddm-secure)",
    )
    threshold: float = key(
        0.5,
        "with secure-aggregation, more than this share of a round's nodes must stay to its end; 0.67 holds against a "
        "server that a third of the nodes conspire with",
        low=0.5,
        below=1,
    )
    canaries: int = key(
        0,
        "an audit: images that each node makes up, of which it puts about half among its own; at the end it looks for "
        "them in the model, and the report says what finding them proves; 0: none",
        low=0,
        high=100_000,
    )
    figures: str = key(
        "none",
        "whether nodes tell what eval.* asks of their images: `none`, or `unprotected`: outside of the promise of "
        "dp-sgd or secure-aggregation",
        choices=("none", "unprotected"),
    )

    @property
    def of_images(self) -> bool:
        """Whether nodes train with differential privacy of each image."""
        return self.mechanism == "dp-sgd"

    @property
    def of_nodes(self) -> bool:
        """Whether the server protects each node in the model."""
        return self.mechanism == "dp-fedavg"

    @property
    def hides_figures(self) -> bool:
        """Whether nodes tell nothing of their images but what a promise covers, and their number."""
        return (self.of_images or self.secure_aggregation) and self.figures == "none"

    @property
    def hides_losses(self) -> bool:
        """Whether this is not even told in a sum."""
        return self.of_images and self.figures == "none"
