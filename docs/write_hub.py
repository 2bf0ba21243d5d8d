"""Writes a copy of the app that can be published on Flower's Hub: what Flower takes there, in its form.

`python docs/write_hub.py DIR --publisher ACCOUNT --repository https://github.com/OWNER/NAME`, then
`flwr login supergrid` and `flwr app publish DIR`. DIR ends in the app's name there, as which `flwr new` finds it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
from flwr.cli.utils import validate_project_name

ROOT = Path(__file__).parent.parent
#: A run there cannot choose extras, so those are in that need little.
_EXTRAS = ("dicom", "dp", "lora", "nifti")
_FRONT = """---
tags: [diffusion, generative, image generation, privacy, compression]
dataset: [Fashion-MNIST, CIFAR-10]
framework: [torch, diffusers]
---

"""
_START = """## Run it from Flower's Hub

```
flwr new @{publisher}/{name} && cd {name}
pip install -e .
flwr run . --stream                                     # four nodes that share handwritten digits, no download
```

In a simulation each SuperNode takes its share of `data.name`. On real SuperNodes each site names its own folder. Three
sites of a demonstration:

```
flwr-datasets create zalando-datasets/fashion_mnist --num-partitions 3 --out-dir demo
flower-supernode … --node-config 'data-path="/…/demo/partition_0"'       # and so on, at each site its own
flwr run . site --stream -c 'data.name="fashion" data.image-size=28 data.channels=1'
```

A run needs `min-nodes` SuperNodes, at the least two.

"""


def manifest(publisher: str) -> dict[str, Any]:
    """Returns the `pyproject.toml` of the copy: in FAB format 1, and with dependencies, which are installed there."""
    own = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, app = own["project"], own["tool"]["flwr"]["app"]
    extras = project.pop("optional-dependencies")
    project["dependencies"] += [need for name in _EXTRAS for need in extras[name]]
    project["license"] = {"file": "LICENSE"}
    del project["license-files"]
    app |= {"publisher": publisher, "fab-format-version": 1, "flwr-version-target": version("flwr")}
    app["fab-include"] += ["LICENSE"]
    tool = {"setuptools": own["tool"]["setuptools"], "flwr": own["tool"]["flwr"]}
    return {"build-system": own["build-system"], "project": project, "tool": tool}


def readme(publisher: str, name: str, repository: str) -> str:
    """Returns the README of the copy, whose links and images are those of the repository.

    Raises:
        ValueError: README.md does not begin as it is expected to.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, clone, rest = text.partition("```\nmake demo")
    _, after, rest = rest.partition("\nEvery site keeps")
    if not clone or not after:
        raise ValueError("README.md: the part about `make demo` is not where it was")
    text = _FRONT + before + _START.format(publisher=publisher, name=name) + after.lstrip() + rest
    text = text.replace(". .venv/bin/activate\n", "")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\1{repository}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\[\]]*\]\()(?!https?:|#)", rf"\1{repository}/blob/main/", text)


def write(folder: Path, publisher: str, repository: str) -> None:
    """Writes the copy into a new folder.

    Raises:
        ValueError: something is there, or Flower takes no such name.
    """
    validate_project_name(folder.name, "DIR")
    for option, value, form in (("publisher", publisher, r"[\w-]+"), ("repository", repository, r"https://\S+")):
        if not re.fullmatch(form, value):
            raise ValueError(f"--{option} = {value!r}: must be of the form {form}")
    if folder.exists():
        raise ValueError(f"DIR = {str(folder)!r}: is there already")
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(tomli_w.dumps(manifest(publisher)), encoding="utf-8")
    (folder / "README.md").write_text(readme(publisher, folder.name, repository), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    shutil.copytree(ROOT / "feddm_flwr", folder / "feddm_flwr", ignore=shutil.ignore_patterns("__pycache__"))


def main() -> None:
    """Writes the copy that the command line asks for."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, metavar="DIR")
    options.add_argument("--publisher", required=True, help="the account at Flower's Hub")
    options.add_argument("--repository", required=True, help="where the documentation is, for the README's links")
    asked = options.parse_args()
    folder = asked.folder.expanduser().resolve()
    try:
        write(folder, asked.publisher, asked.repository.rstrip("/"))
    except ValueError as error:
        sys.exit(f"{error}")
    print(f"{folder}\n  publish it   flwr login supergrid && flwr app publish {folder}")


if __name__ == "__main__":
    main()
