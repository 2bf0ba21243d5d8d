"""What the site needs beside the pages: README is its first page, and files outside of docs/ are named, not linked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds README as the first page; its links are those of a page in docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = LINK.sub(lambda m: f"[{m[1]}]({_from_docs(m[2])}{m[3] or ''})", text)
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts the text of a link in the place of the link where that leads out of docs/."""

    def named(link: re.Match[str]) -> str:
        if not link[2].startswith("../"):
            return link[0]
        if not (ROOT / "docs" / link[2]).exists():
            raise PluginError(f"{page.file.src_path}: there is no {link[2]}")
        return f"`{link[2].removeprefix('../')}`"

    return LINK.sub(named, markdown)


def _from_docs(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
