"""Draw bar charts as SVG that can be read on light and on dark pages, and by screen readers."""

from collections.abc import Mapping
from html import escape

from tables import number

__all__ = ["bars"]

SVG = "http://www.w3.org/2000/svg"
ROW, LABEL, BAR, VALUE, MARGIN = 26, 220, 420, 70, 20  # pixels
_STYLE = """
    .panel { fill: #ffffff } .label, .value, .title { fill: #1f2933 } .bar { fill: #90a4ae } .ours { fill: #00796b }
    text { font: 14px system-ui, sans-serif } .title { font-weight: 600; font-size: 15px }
    @media (prefers-color-scheme: dark) {
      .panel { fill: #1e2129 } .label, .value, .title { fill: #e4e7eb } .bar { fill: #607d8b } .ours { fill: #4db6ac }
    }"""


def bars(title: str, values: Mapping[str, float], ours: frozenset[str]) -> str:
    """Return a horizontal bar for each value, those of ours in another colour.

    Args:
        title: What the numbers are, with their unit; the description lists all of them.
        values: The numbers, none negative, in the order of the bars.
        ours: Names of the bars to be highlighted.
    """
    width, height = MARGIN * 2 + LABEL + BAR + VALUE, MARGIN * 2 + ROW * (len(values) + 1)
    scale = BAR / max(values.values())
    listed = "; ".join(f"{name}: {number(value)}" for name, value in values.items())
    parts = [
        f'<svg xmlns="{SVG}" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title text">',
        f'  <title id="title">{escape(title)}</title>',
        f'  <desc id="text">{escape(listed)}</desc>',
        f"  <style>{_STYLE}\n  </style>",
        f'  <rect class="panel" width="{width}" height="{height}" rx="8"/>',
        f'  <text class="title" x="{MARGIN}" y="{MARGIN + 15}">{escape(title)}</text>',
    ]
    for line, (name, value) in enumerate(values.items(), start=1):
        top, left = MARGIN + ROW * line, MARGIN + LABEL
        length = max(1.0, value * scale)
        kind = "ours" if name in ours else "bar"
        parts += [
            f'  <text class="label" x="{left - 10}" y="{top + 18}" text-anchor="end">{escape(name)}</text>',
            f'  <rect class="{kind}" x="{left}" y="{top + 4}" width="{length:.1f}" height="{ROW - 8}" rx="2"/>',
            f'  <text class="value" x="{left + length + 8:.1f}" y="{top + 18}">{number(value)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
