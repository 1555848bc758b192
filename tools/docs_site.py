"""Hooks of MkDocs: the pages outside docs/ belong to the site too, and links between all of them lead there.

The same files are read in a checkout, so their links are those of the checkout. README.md is the first page; the other
pages outside docs/ are put below project/. A link to a file that is no page becomes the file's name.
"""

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "README.md",
    "SECURITY.md",
    "datasets/README.md",
    "examples/README.md",
    "kg_detectron/models/README.md",
    "results/README.md",
)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: "Files", config: Any, **_: Any) -> "Files":
    """Add the pages outside docs/."""
    from mkdocs.structure.files import File

    for path in OUTSIDE:
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, site_path(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of the checkout into links of the site."""
    place = page.file.src_uri
    source = next((path for path in OUTSIDE if site_path(path) == place), f"docs/{place}")
    return rewritten(markdown, source)


def site_path(path: str) -> str | None:
    """Where a file of the checkout is in the site; None where it is not."""
    if path == "README.md":
        return "index.md"
    if path in OUTSIDE:
        return f"project/{path}"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def rewritten(markdown: str, source: str) -> str:
    """The text of the file `source`, as named from the root of the checkout, with the links of the site."""
    here = site_path(source)
    assert here is not None, source

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        goal = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if goal is None:
            return text if text.startswith("`") else f"{text} (`{target.lstrip('./')}`)"
        return f"{image}[{text}]({posixpath.relpath(goal, posixpath.dirname(here) or '.')}{anchor or ''})"

    return _LINK.sub(link, markdown)
