"""Figures as files and as SVG that lives inside a page.

A figure is drawn once, in light colours. In the page each colour of the palette becomes a CSS variable, so that the
same drawing follows the reader's light or dark setting, and the text takes the page's font. An artist whose id starts
with `TIP` becomes an element that shows the rest of its id as a tooltip.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from blockffn.reporting.palette import LIGHT

TIP = "tip:"
_CLUTTER = re.compile(
    r"<\?xml.*?<svg|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", re.DOTALL
)
_ID = re.compile(r"""\bid=(?:"([^"]*)"|'([^']*)')""")
_FONT = re.compile(r"'DejaVu Sans'[^;\"]*")  # with what matplotlib's own settings name after it
_SIZE = re.compile(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"')
_COORDINATES = re.compile(r' (?:d|x|y|transform)="[^"]*"')
_DECIMALS = re.compile(r"(\.\d{2})\d+")


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element; `name` keeps its ids apart from other figures', `description` is read aloud."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        # Transparent, so that the page's surface and what it draws on it stay visible.
        unnamed = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=unnamed)
    text = _CLUTTER.sub(lambda match: "<svg" if match[0].endswith("<svg") else "", buffer.getvalue())
    text = _ID.sub(lambda match: _identity(match, name), text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'xlink:href="#{name}-')
    text = _SIZE.sub(lambda match: f'<svg {match[1]}role="img" aria-label="{_attribute(description)}"', text, count=1)
    text = _COORDINATES.sub(lambda match: _DECIMALS.sub(r"\1", match[0]), text)
    for color, hexadecimal in LIGHT.items():
        text = text.replace(f": {hexadecimal}", f": var(--{color})")
    return _FONT.sub("var(--sans)", text).strip()


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure at 180 dots per inch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")  # a sample may hold any script
        figure.savefig(path, dpi=180, metadata={"Software": None})


def _identity(match: re.Match[str], name: str) -> str:
    value = match[1] if match[1] is not None else match[2].replace('"', "&quot;")
    if value.startswith(TIP):
        return f'class="tip" data-tip="{value.removeprefix(TIP)}"'
    return f'id="{name}-{value}"'


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
