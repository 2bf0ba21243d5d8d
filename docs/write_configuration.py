"""Write docs/configuration.md from the typed configuration: `make docs`."""

from __future__ import annotations

import inspect
from pathlib import Path

from feddm_flwr import config
from feddm_flwr.config import presets
from feddm_flwr.config.fields import PRESET, KeySpec, sections

TARGET = Path(__file__).parent / "configuration.md"

HEAD = """<!-- written by `make docs` from feddm_flwr/config/keys.py -->
# Configuration

Every run-config key, its default and what is allowed. Set keys with `-c`:

```
feddm run -c 'strategy="feddm-quant" num-server-rounds=20 data.partition="dirichlet"'
flwr run . --stream -c 'train.learning-rate=1e-3'
```

or put them into a TOML file and pass its path: `feddm run -c my-run.toml`. A run writes the configuration it
used to `config.toml` in its folder. An unknown key, a wrong type or a value that is not allowed ends the run
before any training. Give `flwr run` one `-c` only: of two that set keys of one table it loses the first (`feddm run`
merges them). Text needs quotes; lists are text: `"32,64,128"`.

The default `preset` means: decided by another key, see the tables at the end. Any other value is yours and wins,
or is refused where it contradicts (`feddm-vanilla` with `train.mu` above 0).
"""


def text() -> str:
    """The whole page."""
    parts = [HEAD]
    for prefix, section, keys in sections(config.RunConfig):
        parts.append(f"## {f'`{prefix}*`' if prefix else 'The run'}\n")
        if prefix:
            parts.append(f"{inspect.getdoc(section)}\n")
        parts.append("| key | default | allowed | meaning |\n|---|---|---|---|")
        parts += [_row(key) for key in keys]
        parts.append("")
    parts.append("## What `preset` stands for\n")
    parts.append(
        "An empty cell of a strategy: none (`train.mu` 0, `codec.residual-decay` 1), averaging, `train.optimizer` "
        "`adamw`, and `codec.target` `weights`, or `delta` once a codec is set by hand. `codec.error-feedback` is on "
        "where differences are coded.\n"
    )
    for key, table in (
        ("strategy", presets.STRATEGIES),
        ("model.preset", presets.MODELS),
        ("data.name", {**presets.DATASETS, "anything else": presets.OTHER_DATA}),
        ("server.optimizer", presets.SERVER_OPTIMIZERS),
        ("train.optimizer", presets.OPTIMIZERS),
    ):
        names = sorted({name for row in table.values() for name in row})
        parts.append(f"| `{key}` | " + " | ".join(f"`{name}`" for name in names) + " |")
        parts.append("|---" * (len(names) + 1) + "|")
        for choice, row in table.items():
            missing = "must be set" if key == "data.name" else ""
            cells = [f"`{_toml(row[name])}`" if name in row else missing for name in names]
            parts.append(f"| {choice} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _row(key: KeySpec) -> str:
    allowed = key.allowed().replace(f", or {PRESET}", "").replace("|", "\\|")
    return f"| `{key.name}` | `{_toml(key.default)}` | {allowed} | {key.doc} |"


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value}"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
