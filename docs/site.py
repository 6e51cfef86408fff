"""A hook of MkDocs: pages lie in the site as in the repository, so their links hold in both.

Beside the pages of this folder the site has what they link to, and a page for each module with its
docstrings, which links to a module's source lead to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

SHOWN = (
    "*.md",
    "CITATION.cff",
    "docs/*.md",
    "docs/*.png",
    "docs/*.svg",
    "results/mini/*",
    "results/bench/*",
    "results/paper/*",
    "experiments/miniature/*.csv",
    "experiments/miniature/weights/*.md",
    "experiments/miniature/weights/*.png",
)
PACKAGES = ("cad", "baselines", "evaluation", "experiments")


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
    return Files([*theme, *shown, *pages, listing])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to modules lead to their pages."""
    return markdown.replace(".py)", ".md)")
