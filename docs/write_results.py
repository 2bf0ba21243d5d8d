"""Write docs/results.md and its plots from the committed figures: `python docs/write_results.py`.

The figures are `results.json` of the comparison, as `feddm compare benchmarks/fashionmnist.toml` writes it, and, of
some of its runs, what `feddm evaluate RUN --samples 10000 --steps 25 -o x.json` wrote, in one list, each with the
"condition" and "run" that it is of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from feddm_flwr.cli import comparison_tables

HERE = Path(__file__).parent
FIGURES = HERE.parent / "benchmarks" / "results" / "fashionmnist.json"
MANY = FIGURES.with_name("fashionmnist-10000.json")
TARGET = HERE / "results.md"

HEAD = """<!-- written by docs/write_results.py from benchmarks/results/fashionmnist.json -->
# Results

Fashion-MNIST, 28x28, its 60,000 training images (a tenth held out), {nodes} nodes, {rounds} rounds of {steps} steps of
{batch} images on each node: {images:,} images seen in every run, those on all images in one place included:
centralized, as many steps as all nodes together, one after the other; data-parallel, as many steps as one node, each
of all nodes' batches.
A U-Net of 0.69 million parameters, small enough for two CPU cores: these are **not** figures of converged
models: they compare settings.

```
feddm compare benchmarks/fashionmnist.toml -o fashionmnist
```

Samples are drawn by 25 steps of UniPC ("trailing").

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
    many = json.loads(MANY.read_text(encoding="utf-8"))
    notes = HERE / "results-notes.md"  # what a person makes of them
    plots = (
        "![FID against megabytes](images/fid-by-bytes.png)\n\n"
        "![FID against how the images are shared out](images/fid-by-condition.png)\n\n"
    )
    tables = comparison_tables.markdown(results)
    return "".join((head, tables, "\n", plots, of_many(many), notes.read_text(encoding="utf-8")))


def of_many(rows: list[dict[str, Any]]) -> str:
    """The runs that were judged by more samples."""
    columns = ("fid", "kid", "precision", "recall", "coverage")
    lines = [
        f"**{rows[0]['condition']}, {rows[0]['samples']:,} samples** of the shipped models (`feddm evaluate`), by the "
        "same network; the FID of as many real images is "
        f"{rows[0]['fid_floor']:.3f}. This KID is that of subsets, ± its standard deviation over them.\n",
        "| run | FID | KID | precision | recall | coverage |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        fid, kid, *others = (f"{row[key]:.4g}" for key in columns)
        lines.append(f"| {row['run']} | {fid} | {kid} ± {row['kid_std']:.2g} | {' | '.join(others)} |")
    return "\n".join(lines) + "\n\n"


def main() -> None:
    """Write it."""
    results = json.loads(FIGURES.read_text(encoding="utf-8"))
    TARGET.write_text(text(results), encoding="utf-8")
    comparison_tables.plots(results, HERE / "images")


if __name__ == "__main__":
    main()
