"""Turns the formulas of a page into MathML at build time, so that a reader's browser needs no script.

A hook of mkdocs. `pymdownx.arithmatex` marks the formulas and `latex2mathml` translates them.
"""

import html
import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content, **arguments):
    """Replaces every formula of a page.

    Raises:
      RuntimeError: a formula cannot be translated, or a marked element remains.
    """
    page = arguments["page"].file.src_uri
    content = _INLINE.sub(lambda found: to_mathml(found[1], "inline", page), content)
    content = _BLOCK.sub(
        lambda found: f'<div class="formula">{to_mathml(found[1], "block", page)}</div>', content
    )
    if 'class="arithmatex"' in content:
        raise RuntimeError(f"{page}: a formula in a form that tools/docs/mathml.py does not know.")
    return content


def to_mathml(latex, display, page=""):
    """MathML of a formula in HTML, with ``&amp;`` for ``&``.

    Several lines or an ``&`` make it an array of two columns that meet at the ``&``.
    """
    text = html.unescape(latex).strip()
    if display == "block" and ("&" in text or r"\\" in text) and r"\begin" not in text:
        text = rf"\begin{{array}}{{rl}}{text}\end{{array}}"
    try:
        found = convert(text, display=display)
    except Exception as error:
        raise RuntimeError(f"{page}: no MathML for {text!r}: {error}") from error
    found = found.replace("<mtable", '<mtable displaystyle="true"')
    # Browsers that know MathML Core only align by style.
    found = re.sub(r'<mtd columnalign="(\w+)"', r'<mtd style="text-align: \1"', found)
    if "\\" in re.sub(r"<[^>]*>", "", html.unescape(found)):
        raise RuntimeError(f"{page}: a command is left in {text!r}: {found}")
    return found
