"""What mkdocs.yml leaves to code: the navigation, a page per module, and links that leave docs/.

    on_config           navigation from the folders, so that a new note needs no entry anywhere
    on_files            api/...md, one line for mkdocstrings each; source/...md for files that documents link to
    on_page_markdown    [x](../../folovllm/request.py) leads to the module's API page, other files to their source page

Documents keep links that work where they are read as files. A link that leads nowhere stays as it is, and mkdocs then
says so: an error in strict mode.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = "folovllm"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```|~~~)", re.MULTILINE)
LANGUAGES = {".py": "python", ".c": "c", ".h": "c", ".toml": "toml", ".md": "markdown", ".json": "json", ".txt": "text"}
TABS = {"learn": "Learn", "benchmarks": "Benchmarks", "dev": "Development"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the navigation."""
    pages = sorted(path.name for path in DOCS.glob("*.md") if path.name not in ("index.md", "design.md"))
    navigation: list[Any] = [{"Home": ["index.md", *pages]}]
    for folder, title in TABS.items():
        found = sorted((DOCS / folder).rglob("*.md"), key=lambda path: (path.name != "index.md", path))
        navigation.append({title: [path.relative_to(DOCS).as_posix() for path in found]})
    navigation += [{"Design": "design.md"}, {"API": _api_navigation(ROOT / PACKAGE)}]
    config.nav = navigation
    return config


def _api_navigation(folder: Path) -> list[Any]:
    """The modules below a package folder, its own page first."""
    entries: list[Any] = [_api_page(folder / "__init__.py")]
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "__init__.py").is_file():
            entries.append({path.name: _api_navigation(path)})
        elif path.suffix == ".py" and not path.name.startswith("__"):
            entries.append({path.stem: _api_page(path)})
    return entries


def _api_page(path: Path) -> str:
    """The page of a module: api/folovllm/core/sched/scheduler.md, a package's: api/folovllm/core/index.md."""
    name = path.relative_to(ROOT).with_suffix(".md").as_posix()
    return "api/" + name.replace("__init__", "index")


def _modules() -> list[Path]:
    return [path for path in sorted((ROOT / PACKAGE).rglob("*.py")) if path.name != "__main__.py"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file holds."""
    for file in list(files):
        if file.src_uri.startswith(("api/", "source/")):
            files.remove(file)  # left behind by another generator
    linked = {path for file in files.documentation_pages() for path in _outside(file)}
    for path in _modules():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        content = f"# `{module}`\n\n::: {module}\n"
        files.append(File.generated(config, _api_page(path), content=content))
    for path in sorted(linked - set(_modules())):
        page = _source_page(path)
        files.append(File.generated(config, page, content=_show(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def _outside(file: File) -> set[Path]:
    """The files and folders outside docs/ that a document links to."""
    found = set()
    for match in LINK.finditer(_without_code(file.content_string)):
        path = _target(file.src_uri, match[2])
        if path is not None:
            found.add(path)
    return found


def _without_code(markdown: str) -> str:
    return "".join(FENCE.split(markdown)[::4])


def _target(src_uri: str, link: str) -> Path | None:
    """What a relative link leads to, if that exists and lies in the checkout, but not in docs/."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = Path(os.path.normpath(DOCS / Path(src_uri).parent / link))
    if not path.exists() or path.is_relative_to(DOCS) or not path.is_relative_to(ROOT):
        return None
    return path


def _source_page(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    return f"source/{name}.md" if name != "." else "source/index.md"


def _show(path: Path) -> str:
    """A page with a file's content, or a folder's list."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        content = "\n".join(sorted(entry.name for entry in path.iterdir() if not entry.name.startswith((".", "__"))))
    else:
        content = path.read_text(encoding="utf-8", errors="replace")
    # Longer than any fence inside.
    fence = "`" * max(4, 1 + max((len(run) for run in re.findall(r"`+", content)), default=0))
    return f"# {name}\n\n{fence}{LANGUAGES.get(path.suffix, 'text')}\n{content}\n{fence}\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ into links to the pages above."""
    if page.file.src_uri.startswith(("api/", "source/")):
        return markdown
    modules = set(_modules())
    start = os.path.dirname(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        path = _target(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        target = _api_page(path) if path in modules else _source_page(path)
        return f"{match[1]}{os.path.relpath(target, start or '.')}{match[4]}"

    inside = False
    lines = []
    for line in markdown.split("\n"):
        if FENCE.match(line.lstrip()):
            inside = not inside
        lines.append(line if inside else LINK.sub(replace, line))
    return "\n".join(lines)
