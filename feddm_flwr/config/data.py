"""The keys of the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from feddm_flwr.config.fields import PRESET, key
from feddm_flwr.config.names import class_name


@dataclass(frozen=True)
class Data:
    """Which images, and how a simulation shares them out. On a real node `data-path` wins."""

    name: str = key(
        "digits",
        "`digits` (scikit-learn's handwritten digits, 8x8, no download), a Hugging Face data set id, "
        "a folder of images, or a parquet file; a relative path starts at the server's folder",
    )
    split: str = key(
        "train",
        "split that is trained on: of a hub data set, or of a folder that has train, valid, test, … in the names of "
        "its folders or files; `all`: no name is one of a split",
    )
    subset: str = key("", "configuration of a hub data set that has several")
    reader: str = key(
        "auto",
        "how the files of data.name, or of a node's data-path, are read: by what they are, or by an extension",
        choices=("auto",),
        plugin=True,
    )
    streaming: bool = key(
        False, "read a hub data set or parquet as a stream: only decoded images are kept on disk, at their final size"
    )
    partition: str = key(
        "iid",
        "how a simulation shares the images among its nodes; pathological: few classes each, dealt like cards",
        choices=("iid", "dirichlet", "pathological", "shard", "natural"),
    )
    alpha: float = key(0.3, "concentration of the Dirichlet partition: smaller is more skewed", above=0)
    classes_per_node: int = key(2, "classes a node holds in the pathological partition", low=1)
    shards_per_node: int = key(2, "shards a node holds in the shard partition", low=1)
    natural_column: str = key("", "column whose values are the nodes in the natural partition (patient, site, writer)")
    group_column: str = key(
        "",
        "column that says which images belong together (a patient's); `folder`: those of one folder do; `PatientID`: "
        "DICOM files of one do. They are held out together or not at all, dealt to one node, and one record to dp-sgd",
    )
    image_size: int = key(PRESET, "height and width in pixels; images are resized and centre-cropped to it", low=4)
    channels: int = key(PRESET, "1 (grey) or 3 (RGB)", low=1, high=3)
    image_column: str = key(PRESET, "column that holds the images")
    label_column: str = key(
        PRESET,
        "column that holds the classes (of a folder: its first level of subfolders): for partitions, models with "
        "classes, coverage",
    )
    classes: str = key(
        PRESET,
        "names of all classes of the federation, separated by commas: for model.class-conditional (preset: known data "
        "sets' own), and, without it, for coverage; what a data-path has of classes is told to nobody but for these",
    )
    black: float = key(
        0.0, "value that is black in grey images of more than 8 bits, and of floating-point or negative values"
    )
    white: float = key(
        65535.0,
        "value that is white in the same: 4095 for 12-bit X-rays, 1 for floating-point values to 1; PGM says its own",
    )
    window_center: float = key(
        0.0, "with window-width, the value that is grey: black and white are half a width off it"
    )
    window_width: float = key(
        0.0,
        "values from black to white, of images of more than 8 bits, instead of data.black and data.white: 400 about 40 "
        "for soft tissue in a CT; 0: what a DICOM or NIfTI file says itself (docs/models.md)",
        low=0,
    )
    pages: str = key("first", "which pages of a TIFF, or frames of a GIF, are images", choices=("first", "all"))
    slice_axis: str = key("axial", "how NIfTI volumes are cut", choices=("axial", "coronal", "sagittal"))
    slice_content: float = key(
        0.05, "share of a NIfTI slice that must be more than nearly black, else it is left out", low=0, high=1
    )
    flip: bool = key(PRESET, "mirror training images left to right at random")
    eval_fraction: float = key(0.1, "share of its images that a node holds out for `eval_loss`", low=0, below=1)
    max_broken: float = key(0.01, "share of a node's images that are skipped where they cannot be read", low=0, below=1)

    @property
    def class_names(self) -> tuple[str, ...]:
        """`classes` one by one; the place of a class is its label."""
        return tuple(class_name(name) for name in self.classes.split(",") if name.strip())


def about_data(d: Data) -> Iterator[str]:
    """Yields what contradicts itself in the section."""
    if not d.name.strip():
        yield "data.name = '' is not allowed: must be digits, an id of a hub, a folder, or parquet files"
    if d.channels == 2:
        yield "data.channels = 2 is not allowed: must be 1 (grey) or 3 (RGB)"
    if not d.black < d.white:
        yield f"data.black = {d.black:g} with data.white = {d.white:g}: must be less"
    if d.window_width and (d.black, d.white) != (0, 65535):
        yield (
            f"data.window-width = {d.window_width:g} with data.black = {d.black:g} and data.white = "
            f"{d.white:g}: both say what is black and what is white; set the window or the two ends"
        )
    if d.window_center and not d.window_width:
        yield f"data.window-center = {d.window_center:g} with data.window-width = 0: must have a width, too"
    if d.partition == "natural" and not (d.natural_column or d.group_column):
        yield (
            "data.natural-column = '' with data.partition = 'natural': must name a column whose values are the nodes, "
            "or data.group-column one whose values are dealt to them"
        )
