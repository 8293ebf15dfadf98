"""Follows every link of the built site and checks that its page, anchor or picture exists.

    python tools/docs/check_site.py build/site

Links to other hosts are counted but not followed. Scripts, styles and pictures of other hosts are errors.
"""

import pathlib
import posixpath
import re
import sys
import urllib.parse
from html.parser import HTMLParser

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}
LISTED_ONLY = {"canonical", "next", "prev", "alternate"}


class Page(HTMLParser):
    """The links, resources and anchors of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.formulas = self.words = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Collects one element."""
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.formulas += tag == "math"
        for name, value in attrs:
            if value is None:
                continue
            if (tag, name) in LOADED:
                if given.get("rel") not in LISTED_ONLY:
                    self.loads.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)


def check(site):
    """Returns the problems found, and counts."""
    pages = {
        path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }
    problems, counts = [], {"pages": len(pages), "links": 0, "formulas": 0, "elsewhere": 0}
    for name, page in pages.items():
        counts["formulas"] += page.formulas
        for target in page.loads:
            if re.match(r"(https?:)?//", target):
                problems.append(f"{name}: loads {target}")
        for target in page.links + page.loads:
            if re.match(r"(https?:)?//|mailto:", target):
                counts["elsewhere"] += 1
            elif not re.match(r"data:|javascript:", target):
                counts["links"] += 1
                problem = follow(site, pages, name, target)
                if problem:
                    problems.append(f"{name}: {problem}")
    return problems, counts


def follow(site, pages, name, target):
    """The fault of a link inside the site, or None."""
    path, _, anchor = urllib.parse.unquote(target).partition("#")
    if path.startswith("/"):
        return None if name == "404.html" else f"absolute link {target}"
    there = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
    if there.startswith(".."):
        return f"link out of the site {target}"
    if (site / there).is_dir():
        there = posixpath.join(there, "index.html") if there != "." else "index.html"
    if not (site / there).is_file():
        return f"no such file {target}"
    if anchor and there in pages and anchor not in pages[there].anchors and anchor != "__skip":
        return f"no such anchor {target}"
    return None


def main():
    """Prints the problems and the counts; 1 if there is a problem."""
    problems, counts = check(pathlib.Path(sys.argv[1]))
    for problem in problems:
        print(problem)
    print(
        f"{counts['pages']} pages, {counts['formulas']} formulas, {counts['links']} links within the site, "
        f"{counts['elsewhere']} to other hosts (not followed): {len(problems)} broken"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
