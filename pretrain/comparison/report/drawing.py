"""How pictures are drawn: SVG by matplotlib, in colours that the page's style sheet decides.

Every colour here is a stand-in that becomes a CSS variable, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.legend import Legend

ARM_COLOURS = 8
INK, FAINT, RULE, PAPER = "#b00001", "#b00002", "#b00003", "#b00004"
_VARIABLES = {INK: "--ink", FAINT: "--faint", RULE: "--rule", PAPER: "--paper"}
_VARIABLES |= {f"#a0000{i}": f"--arm-{i + 1}" for i in range(ARM_COLOURS)}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 12.5,
    "axes.titlesize": 12.5,
    "axes.labelsize": 12.5,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": RULE,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Picture:
    """One figure: a title, a caption, what it shows in words for those who cannot see it, and how it is drawn."""

    title: str
    caption: str
    alternative: str
    draw: Callable[[], Figure]

    @property
    def svg(self) -> str:
        """The drawing as an inline SVG element: colours as CSS variables, no size of its own, ids that are its own."""
        stream = io.StringIO()
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": self.title}):
            FigureCanvasSVG(self.draw()).print_svg(
                stream, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
            )
        text = stream.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
        # A style element inside the drawing would be one for the whole page; style.css says the same.
        text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.S)
        # Ids such as line2d_7 are alike in every drawing and referred to by nothing.
        text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
        text = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 var(--sans)", text)
        for stand_in, variable in _VARIABLES.items():
            text = text.replace(stand_in, f"var({variable})")
        return text.strip()


def new_figure(height: int) -> Figure:
    # One unit of the drawing is one CSS pixel in a window of 840 or wider.
    return Figure(figsize=(840 / 72, height / 72), dpi=72)


def arm_colour(index: int) -> str:
    return f"#a0000{index % ARM_COLOURS}"


def marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def name_legend(legend: Legend, labels: Sequence[str]) -> None:
    """Write the names afterwards, because matplotlib leaves out those that begin with an underscore."""
    for text, label in zip(legend.get_texts(), labels):
        text.set_text(label)
