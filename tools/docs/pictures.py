"""Makes every picture of a page a link to itself, so that a reader can see it in full size.

A hook of mkdocs.
"""

import re

_PICTURE = re.compile(r'(?<!">)<img [^>]*?src="([^"]+)"[^>]*>')


def on_page_content(content, **_):
    """Wraps the pictures that are not in a link already."""
    return _PICTURE.sub(r'<a class="picture" href="\1">\g<0></a>', content)
