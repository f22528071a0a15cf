"""A plot area with axes, as an SVG string; colours come from the page's style sheet by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

CHARACTER_WIDTH, LINE_HEIGHT = 6.1, 13.0


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within ``[low, high]``."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within ``[low, high]``, with 2 and 5 times them where there would be fewer than three."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    return ticks


def tag(name: str, css: str, content: str = "", **attributes: Any) -> str:
    """One element; ``_`` in attribute names stands for ``-``, numbers are rounded to a tenth, text is escaped."""
    written = "".join(
        f' {key.replace("_", "-")}="{f"{value:.1f}" if isinstance(value, float) else escape(value)}"'
        for key, value in attributes.items()
    )
    return f'<{name} class="{css}"{written}>{escape(content)}</{name}>'


def axis_name(text: str, x: float, y: float, upright: bool = False) -> str:
    """What an axis shows, centred at a point, read from below where ``upright``."""
    turn = " rotate(-90)" if upright else ""
    return tag("text", "axis", text, transform=f"translate({x:.1f} {y:.1f}){turn}", text_anchor="middle")


def frame(css: str, width: float, height: float, max_width: float, title: str, parts: Sequence[str]) -> str:
    """The picture around its parts; it shrinks with the page and grows to ``max_width`` pixels."""
    start = f'<svg class="{css}" viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{max_width:.0f}px"'
    return f'{start} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class Axis:
    """A mapping from values to pixels.

    Attributes:
        low, high: the range of values.
        label: what is measured, with its unit.
        show: a tick's text.
        log: whether equal ratios are equally far apart.
        ticks: where to put marks; chosen if empty.
    """

    low: float
    high: float
    label: str
    show: Callable[[float], str]
    log: bool = False
    ticks: Sequence[float] = ()

    def position(self, value: float) -> float:
        """Where a value lies, 0 at ``low`` and 1 at ``high``."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def marks(self) -> Sequence[float]:
        return self.ticks or (log_ticks if self.log else linear_ticks)(self.low, self.high)


@dataclass
class Plot:
    """Collects shapes in data coordinates; ``str(plot)`` is the SVG."""

    x: Axis
    y: Axis
    title: str
    width: float = 560
    height: float = 350
    left: float = 58
    right: float = 16
    top: float = 14
    bottom: float = 46
    shapes: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        return self.left + self.x.position(value) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        return self.height - self.bottom - self.y.position(value) * (self.height - self.top - self.bottom)

    def circle(self, x: float, y: float, css: str, tip: str = "", radius: float = 5) -> None:
        """A point; ``tip`` shows on hover and on keyboard focus."""
        reachable: dict[str, Any] = {"data_tip": tip, "tabindex": 0} if tip else {}
        self.shapes.append(tag("circle", css, cx=self.px(x), cy=self.py(y), r=radius, **reachable))

    def line(self, points: Sequence[tuple[float, float]], css: str) -> None:
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        self.shapes.append(tag("polyline", css, points=path))

    def rect(self, x0: float, x1: float, y0: float, y1: float, css: str, tip: str = "") -> None:
        left, right, top, bottom = self.px(x0), self.px(x1), self.py(max(y0, y1)), self.py(min(y0, y1))
        size: dict[str, Any] = {"width": right - left, "height": max(bottom - top, 0.0)}
        self.shapes.append(tag("rect", css, x=left, y=top, **size, **({"data_tip": tip} if tip else {})))

    def text(self, x: float, y: float, text: str, anchor: str = "start", css: str = "label") -> None:
        """Text at pixel coordinates."""
        self.shapes.append(tag("text", css, text, x=x, y=y, text_anchor=anchor))

    def labels(self, named: Sequence[tuple[float, float, str]], obstacles: Sequence[tuple[float, float]]) -> None:
        """Name points where the text meets neither a point, an earlier text, nor the border; else not at all."""
        taken = [(self.px(x) - 5, self.py(y) - 5, self.px(x) + 5, self.py(y) + 5) for x, y in obstacles]
        for x, y, name in named:
            cx, cy, wide = self.px(x), self.py(y), CHARACTER_WIDTH * len(name)
            spots = [
                (cx - 9, cy - 5, "end"), (cx, cy - 10, "middle"), (cx + 9, cy + 4, "start"), (cx - 9, cy + 4, "end"),
                (cx, cy + 18, "middle"), (cx + 9, cy - 6, "start"), (cx + 9, cy + 14, "start"),
            ]  # fmt: skip
            for tx, ty, anchor in spots:
                start = tx - {"end": wide, "middle": wide / 2, "start": 0}[anchor]
                box = (start, ty - LINE_HEIGHT + 3, start + wide, ty + 3)
                inside = (
                    box[0] > self.left and box[2] < self.width and box[1] > 0 and box[3] < self.height - self.bottom
                )
                if inside and not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    self.text(tx, ty, name, anchor, "label strong")
                    break

    def __str__(self) -> str:
        right, bottom = self.width - self.right, self.height - self.bottom
        parts = []
        for tick in self.y.marks():
            at = self.py(tick)
            parts.append(tag("line", "gridline", x1=self.left, x2=right, y1=at, y2=at))
            parts.append(tag("text", "tick", self.y.show(tick), x=self.left - 8, y=at + 4, text_anchor="end"))
        for tick in self.x.marks():
            at = self.px(tick)
            parts.append(tag("line", "gridline", x1=at, x2=at, y1=self.top, y2=bottom))
            parts.append(tag("text", "tick", self.x.show(tick), x=at, y=bottom + 17, text_anchor="middle"))
        parts.append(axis_name(self.x.label, (self.left + right) / 2, self.height - 8))
        parts.append(axis_name(self.y.label, 13, (self.top + bottom) / 2, upright=True))
        return frame("plot", self.width, self.height, 1.2 * self.width, self.title, [*parts, *self.shapes])

    def __html__(self) -> str:
        return Markup(str(self))


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def clip_text(text: str, length: int) -> str:
    """The text, cut with an ellipsis where it is longer than ``length``."""
    return text if len(text) <= length else text[: length - 1] + "…"
