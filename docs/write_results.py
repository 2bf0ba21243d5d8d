"""Write docs/results.md and its plots from the committed figures: `python docs/write_results.py`.

The figures are `results.json` of the comparison, as `feddm compare benchmarks/fashionmnist.toml` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from feddm_flwr import comparison_tables

HERE = Path(__file__).parent
FIGURES = HERE.parent / "benchmarks" / "results" / "fashionmnist.json"
TARGET = HERE / "results.md"

HEAD = """<!-- written by docs/write_results.py from benchmarks/results/fashionmnist.json -->
# Results

Fashion-MNIST, 28x28, all 60,000 training images, {nodes} nodes, {rounds} rounds of {steps} steps of {batch} images on
each node: {images:,} images seen in every run, the centralized ones included, which are the same loop on one node with
all images. A U-Net of 0.69 million parameters, small enough for two CPU cores: these are **not** figures of converged
models: they compare settings.

```
feddm compare benchmarks/fashionmnist.toml -o fashionmnist
```

"""


def text(results: list[dict[str, Any]]) -> str:
    """The document."""
    one = next(r for r in results if r["nodes"] > 1)
    head = HEAD.format(
        nodes=one["nodes"],
        rounds=one["rounds"],
        steps=one["keys"]["train.local-steps"],
        batch=one["keys"]["train.batch-size"],
        images=one["images"],
    )
    notes = HERE / "results-notes.md"  # what a person makes of them
    plot = "![FID against megabytes](images/fid-by-bytes.png)\n\n"
    return head + comparison_tables.markdown(results) + "\n" + plot + notes.read_text(encoding="utf-8")


def main() -> None:
    """Write it."""
    results = json.loads(FIGURES.read_text(encoding="utf-8"))
    TARGET.write_text(text(results), encoding="utf-8")
    comparison_tables.plots(results, HERE / "images")


if __name__ == "__main__":
    main()
