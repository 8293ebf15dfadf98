"""Adds pages to the site for files outside of docs/, and directs links to them.

A hook of mkdocs. CHANGELOG.md and CONTRIBUTING.md become pages. A link from a page to another file of the
repository, a test or a script, leads to a generated page with that file, so the site is complete on any host. A
link to a file that does not exist fails the strict build.
"""

import logging
import pathlib
import posixpath
import re

from mkdocs.structure.files import File, InclusionLevel

INCLUDED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
HOME = {"README.md": "index.md"}
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".json": "json", ".md": "markdown"}
LINK = re.compile(r"(?<!!)(\[[^\]]*\]\()([^)\s]+)(\))")

log = logging.getLogger("mkdocs.hooks.repository")


def on_config(config):
    """Expands the entries of the navigation that hold a ``*``."""
    docs = pathlib.Path(config.docs_dir)
    config.nav = _expand(config.nav, docs, _named(config.nav))
    return config


def _named(entries):
    """The files that the navigation names, at any depth."""
    if isinstance(entries, str):
        return {entries}
    values = entries.values() if isinstance(entries, dict) else entries
    return set().union(*map(_named, values)) if values else set()


def _expand(entries, docs, named):
    expanded = []
    for entry in entries:
        if isinstance(entry, str) and "*" in entry:
            found = sorted(path.relative_to(docs).as_posix() for path in docs.glob(entry))
            expanded += [name for name in found if name not in named]
        elif isinstance(entry, dict):
            expanded.append(
                {
                    title: _expand(part, docs, named) if isinstance(part, list) else part
                    for title, part in entry.items()
                }
            )
        else:
            expanded.append(entry)
    return expanded


def on_files(files, config):
    """Adds the included pages, and a page for every file outside of docs/ that a page links to."""
    root = pathlib.Path(config.config_file_path).parent
    for name, page in INCLUDED.items():
        text = (root / name).read_text()
        files.append(File.generated(config, page, content=_from_root(text)))
    wanted = set()
    for file in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(file.content_string):
            outside = _outside(file.src_uri, target, config)
            if outside and outside not in {**INCLUDED, **HOME}:
                wanted.add(outside)
    for name in sorted(wanted):
        path = root / name
        if not path.is_file():
            log.warning("A page links to '%s', which is no file of the repository.", name)
            continue
        language = LANGUAGES.get(path.suffix, "text")
        text = f"---\nsearch:\n  exclude: true\n---\n# {path.name}\n\n`{name}`\n\n"
        text += f"~~~~~~{language}\n{path.read_text().rstrip()}\n~~~~~~\n"
        files.append(
            File.generated(
                config, _page_of(name), content=text, inclusion=InclusionLevel.NOT_IN_NAV
            )
        )
    return files


def on_page_markdown(markdown, page, config, files):
    """Directs the links of a page that leave docs/ to the generated pages."""

    def point(found):
        outside = _outside(page.file.src_uri, found[2], config)
        if outside is None:
            return found[0]
        fragment = "#" + found[2].partition("#")[2] if "#" in found[2] else ""
        target = {**INCLUDED, **HOME}.get(outside) or _page_of(outside)
        start = posixpath.dirname(page.file.src_uri)
        return f"{found[1]}{posixpath.relpath(target, start or '.')}{fragment}{found[3]}"

    return LINK.sub(point, markdown)


def _page_of(name):
    return f"source/{name}.md"


def _from_root(text):
    """A file of the root as a page of docs/: links gain a ``../``, or lose their ``docs/``."""

    def point(found):
        target = found[2]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        target = target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
        return found[1] + target + found[3]

    return LINK.sub(point, text)


def _outside(source, target, config):
    """The file of the repository that a link leads to, or None if it stays in docs/ or goes elsewhere."""
    target = target.partition("#")[0]
    if not target or re.match(r"[a-z]+:", target):
        return None
    docs = pathlib.Path(config.docs_dir).name
    resolved = posixpath.normpath(posixpath.join(docs, posixpath.dirname(source), target))
    return None if resolved.startswith((f"{docs}/", "../")) else resolved
