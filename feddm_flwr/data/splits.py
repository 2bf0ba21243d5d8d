"""Which part of a data set is to be trained on, by the names of its folders and files.

An image to test with that is trained on makes every figure of a run wrong, and nothing shows it. So a name that is
usually a split's is one, in any case and spelling, and where only some names are, nothing is guessed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path, PurePath

from feddm_flwr.config import ConfigError

#: The split that is everything.
ALL = "all"
_NAMES = {
    "train": ("train", "training", "trn", "trainval"),
    "validation": ("validation", "valid", "validate", "val", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tests", "tst", "holdout", "heldout"),
}
_OF = {name: split for split, names in _NAMES.items() for name in names}
# Too short to mean a split but beside a word for images: imagesTr, of the medical decathlon; tr is a language, too.
_SHORT = {"tr": "train", "ts": "test"}
_IMAGES = {"images", "image", "imgs", "img"}
_MASKS = {"masks", "mask", "labels", "label", "annotations", "annotation", "segmentations", "segmentation", "gt"}
_GENERIC = {"set", "data", "dataset", *_IMAGES, "split", "labels"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+")


def _words(name: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(unicodedata.normalize("NFKC", name))]


def _of_words(words: Sequence[str]) -> str:
    said = "".join(word for word in words if word not in _GENERIC)
    short = _SHORT.get(said, "") if len(words) > 1 and {*words} & _GENERIC else ""
    return _OF.get(said) or _OF.get(said.removesuffix("set")) or short


def split_of(name: str) -> str:
    """Returns the split that a folder's name means: `train`, `validation` or `test`; "" where it means none."""
    return _of_words(_words(name))


def splits_in(stem: str) -> set[str]:
    """Returns the splits that are anywhere in the name of a file, without its ending."""
    plain = [word.casefold() for word in re.findall(r"[^\W\d_]+", unicodedata.normalize("NFKC", stem))]
    pairs = [one + other for one, other in pairwise(plain)]  # hold_out
    return {split for word in (*_words(stem), *plain, *pairs) if (split := _of_words([word]))}


def in_split(
    paths: Sequence[Path], root: Path, wanted: str, origin: str, *, tables: bool
) -> list[tuple[Path, tuple[str, ...]]]:
    """Returns the files below `root` that are of the split that is `wanted`, and the folders that each lies in, without
    those that name a split. Where folders name none, the names of `tables` may, or the first words of images' names.

    Raises:
        ConfigError: there is no such split, or only some of the files are of one.
    """
    parts = {path: path.relative_to(root).parts[:-1] for path in paths}
    if wanted == ALL:
        return [*parts.items()]
    for depth in range(max(map(len, parts.values()), default=0)):
        folders = {path: part[depth] if depth < len(part) else "" for path, part in parts.items()}
        splits = {path: split_of(name) for path, name in folders.items()}
        if any(splits.values()):
            chosen = _choose(splits, folders, wanted, origin)
            return [(path, part[:depth] + part[depth + 1 :]) for path, part in parts.items() if path in chosen]
    if tables:
        found = {path: splits_in(_stem(path)) for path in paths}
        if mixed := next((of for of in found.values() if len(of) > 1), None):
            raise _unclear(origin, mixed, "in one file's name")
        splits = {path: next(iter(of), "") for path, of in found.items()}
    else:
        splits = {path: _of_words(_words(_stem(path))[:1]) for path in paths}
        if not all(splits.values()) or len({*splits.values()}) < 2:  # names of images are anything
            splits = dict.fromkeys(paths, "")
    chosen = _choose(splits, {path: path.stem for path in paths}, wanted, origin)
    return [(path, part) for path, part in parts.items() if path in chosen]


def check_masks(paths: Iterable[Path], root: Path, origin: str) -> None:
    """Checks that there are no masks of segmented images among images.

    Raises:
        ConfigError: beside a folder of images there is one that is called after what is marked in them.
    """
    kinds: dict[int, set[str]] = {}
    for folder in {path.parent for path in paths}:
        for depth, name in enumerate(folder.relative_to(root).parts):
            said = {word for word in _words(name) if not (_of_words([word]) or word in _SHORT)}
            if said and said <= _IMAGES | _MASKS:
                kinds.setdefault(depth, set()).add("masks" if said & _MASKS else "images")
    if any(len(found) > 1 for found in kinds.values()):
        raise ConfigError(
            f"{origin}: has folders of images, and others of masks or labels, which would be trained on; name the "
            f"folder of the images, or leave only that there; data.split = '{ALL}' takes everything"
        )


def _stem(path: PurePath) -> str:
    return path.name.partition(".")[0]


def _choose(splits: dict[Path, str], names: dict[Path, str], wanted: str, origin: str) -> set[Path]:
    """Returns the files of the split that is wanted, of the splits and of the names that they go by."""
    there = {*splits.values()} - {""}
    if "" in splits.values() and there:
        if named := {path for path, name in names.items() if name == wanted and not splits[path]}:
            return named  # a split of another name, which the configuration says
        raise _unclear(origin, there, "beside others")
    split = split_of(wanted)
    if not there and split == "train":
        return {*splits}
    if split not in there:
        raise no_such_split(wanted, origin, there)
    return {path for path, of in splits.items() if of == split}


def no_such_split(wanted: str, origin: str, there: Iterable[str]) -> ConfigError:
    """Returns the error that a data set has no such split."""
    listed = ", ".join(sorted(there)) or "none"
    return ConfigError(
        f"data.split = {wanted!r}: {origin} has no such split; there are: {listed}; '{ALL}' takes everything"
    )


def _unclear(origin: str, there: Iterable[str], how: str) -> ConfigError:
    return ConfigError(
        f"{origin}: has {', '.join(sorted(there))} {how}, so that it is not clear what to train on: name all "
        "splits train, valid or test, leave only splits there, or name the folder that is meant; "
        f"data.split = '{ALL}' takes everything, and such names for classes"
    )
