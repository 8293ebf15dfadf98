"""Converts docstrings to Markdown for the API reference: formulas, literal blocks, links between public names.

An extension of griffe. Docstrings here are written in Google's style with a little reStructuredText, so that
`help()` reads well; the site's formulas are dollars and its links Markdown.
"""

import ast
import pathlib
import re
import textwrap

import griffe

PACKAGES = ("lorapre_optax", "sage_optax", "layout_optax")
TYPES = {
    "LayoutLike": "layout_optax.layout.LayoutLike",
    "RankLike": "lorapre_optax._rank.RankLike",
}
ROOT = pathlib.Path(__file__).parents[2]


def public_names():
    """Every public name of the packages and its place in the reference; re-exports have none of their own."""
    places = {}
    for package in PACKAGES:
        tree = ast.parse((ROOT / package / "__init__.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                places |= {name: f"{package}.{name}" for name in ast.literal_eval(node.value)}
    return {**places, **TYPES}


NAMES = public_names()


def to_markdown(text):
    """A docstring's text as Markdown."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r"^( *)\.\. math::\n((?:\1 +.*\n|\s*\n)+)", _display, text, flags=re.MULTILINE)
    text = re.sub(r"^( *)::\n\n", r"\n", text, flags=re.MULTILINE)
    text = re.sub(r"::\n\n(?=    )", ":\n\n", text)
    return re.sub(r"(?<![`\[\w])`((?:\w+_optax\.)?)(\w+)`(?![`\]])", _link, text)


def _display(found):
    body = textwrap.dedent(found[2]).strip()
    return textwrap.indent(f"\n$$\n{body}\n$$\n\n", found[1])


def _link(found):
    package, name = found[1], found[2]
    if name not in NAMES or (name == "STATIC_ARGS" and not package):
        return found[0]
    target = NAMES[name]
    return f"[`{package}{name}`][{target}]"


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every loaded object."""

    def on_object(self, *, obj, **arguments):
        """Called for each object after its members are known."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
