"""A hook of MkDocs: pages lie in the site as in the repository, so their links hold in both.

Beside the pages of this folder the site has what they link to, and a page for each module with its
docstrings, which links to a module's source lead to. Notebooks are run and shown with their output.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

SHOWN = (
    "*.md",
    "CITATION.cff",
    "docs/*.md",
    "docs/*.png",
    "docs/*.webp",
    "conf/names.yaml",
    "tests/readings.py",
    "results/mini/*",
    "results/bench/*",
    "results/paper/*",
    "experiments/miniature/*.csv",
    "experiments/miniature/weights/*.md",
    "experiments/miniature/weights/*.png",
)
PACKAGES = ("cad", "baselines", "evaluation", "experiments")
LINK = re.compile(r"(\]\((?!\.\./tests/)[^)\s]*)\.(?:py|ipynb)\)")


def on_files(files: Files, config: Any) -> Files:
    """The site's files in the place of those of docs_dir."""
    root = Path(config.config_file_path).parent
    theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = [path for pattern in SHOWN for path in sorted(root.glob(pattern)) if path.is_file()]
    shown = [
        File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path))
        for path in paths
    ]
    modules = [path.relative_to(root) for name in PACKAGES for path in (root / name).rglob("*.py")]
    named = {".".join(path.with_suffix("").parts): path for path in sorted(modules)}
    named = {name: path for name, path in named.items() if path.name != "__init__.py"}
    pages = [
        File.generated(config, path.with_suffix(".md").as_posix(), content=f"::: {name}\n")
        for name, path in named.items()
    ]
    index = [f"- [{name}]({path.with_suffix('.md')})" for name, path in named.items()]
    listing = File.generated(config, "api.md", content="# API\n\n" + "\n".join(index) + "\n")
    books = [each for path in root.glob("docs/notebooks/*.ipynb") for each in _run(path, config)]
    return Files([*theme, *shown, *pages, *books, listing])


def _run(path: Path, config: Any) -> list[File]:
    """A notebook's page, with what its cells print and draw, and its pictures."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in (each for each in book.cells if each.cell_type == "code"):
        cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]  # bars
    text, made = MarkdownExporter().from_notebook_node(book, {"unique_key": path.stem})
    files = {f"{path.stem}.md": text, **made["outputs"]}
    return [
        File.generated(config, f"docs/notebooks/{name}", content=content)
        for name, content in files.items()
    ]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to modules, but not to tests, and to notebooks lead to their pages."""
    return LINK.sub(r"\1.md)", markdown)
