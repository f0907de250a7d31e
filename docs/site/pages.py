"""What mkdocs.yml adds to the pages of docs/: README.md as the first page, every setting, and files that links lead to.

Pages keep the links that they have in the repository. Those that lead out of docs/ are turned to where the site has
the same file: a page of its own for README.md, CHANGELOG.md and CONTRIBUTING.md, a copy under project/ for others.
"""

import ast
import dataclasses
import inspect
import itertools
import posixpath
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fastgrpo.settings.schema import TrainConfig
from fastgrpo.settings.toml import shown, type_name

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
"""Pages that lie outside of docs/ -> their names on the site."""

_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that docs/ does not have."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "settings.md", content=settings_page()))
    for source in sorted(
        {path for page in _sources() for path in _linked(page) if _on_site(path).startswith("project/")}
    ):
        files.append(File.generated(config, _on_site(source), content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that lead out of docs/."""
    sources = {_on_site(source): source for source in _sources()}
    source = sources.get(page.file.src_uri, page.file.src_uri.removeprefix("project/"))
    return _LINK.sub(lambda link: _turned(link[0], source), markdown)


def settings_page() -> str:
    """Every setting with its default, kind and docstring, as Markdown."""
    title = [
        "# Every setting",
        "",
        "`group.name` is `--group.name value` on the command line and `name` under `[group]` in a TOML file.",
        "",
    ]
    return "\n".join(title + list(_group(TrainConfig(), ""))) + "\n"


def _group(values: Any, name: str) -> Iterator[str]:
    """Lines about a group's settings, then those about the groups in it."""
    kinds, told = typing.get_type_hints(type(values)), _docstrings(type(values))
    yield from (f"## `{name}`" if name else "## At the top", "", inspect.cleandoc(type(values).__doc__ or ""), "")
    groups = {}
    for field in dataclasses.fields(values):
        full, value = f"{name}.{field.name}".lstrip("."), getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            groups[full] = value
        else:
            text = " ".join(told[field.name].split())
            yield from (f"- **`{full}`** = `{shown(value)}` ({type_name(kinds[field.name])}): {text}", "")
    for full, group in groups.items():
        yield from _group(group, full)


def _docstrings(kind: type) -> dict[str, str]:
    """Field name -> the docstring below it, of a dataclass and those that it extends."""
    found: dict[str, str] = {}
    for each in kind.__mro__[:-1]:
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found.setdefault(field.target.id, ast.literal_eval(text.value))
    return found


def _sources() -> list[str]:
    """The pages, as paths in the repository."""
    return [*PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def _linked(source: str) -> Iterator[str]:
    """The project's files that a page links to, as paths in the repository."""
    for link in _LINK.findall((ROOT / source).read_text(encoding="utf-8")):
        yield _path(link, source)


def _path(link: str, source: str) -> str:
    """Where a link of the page `source` leads, as a path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _on_site(path: str) -> str:
    """What the site calls a file of the repository."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"project/{path}")


def _turned(link: str, source: str) -> str:
    """A link of the page `source` as the site has it, relative to the page there."""
    return posixpath.relpath(_on_site(_path(link, source)), posixpath.dirname(_on_site(source)) or ".")
