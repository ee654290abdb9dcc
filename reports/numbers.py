"""How numbers are written: percent with one decimal, real minus signs, thin spaces between thousands."""

from __future__ import annotations

from suite.statistics import Interval

DASH = "—"


def percent(value: float, decimals: int = 1) -> str:
    """0.7841 -> 78.4"""
    return f"{100 * value:.{decimals}f}".replace("-", "−")


def signed(value: float, decimals: int = 1) -> str:
    """0.021 -> +2.1; zero has no sign."""
    text = f"{100 * value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def chance(value: float) -> str:
    """A p-value: 0.031, 0.4, below 0.001."""
    return "below 0.001" if value < 0.001 else f"{value:.2g}"


def interval(found: Interval, sign: bool = True) -> str:
    """[−0.3, +2.7], in points."""
    write = signed if sign else percent
    return f"[{write(found.low)}, {write(found.high)}]"


def count(value: float) -> str:
    """49152 -> 49 152 (thin spaces)."""
    return f"{round(value):,}".replace(",", "\u202f")


def short(value: float) -> str:
    """1230000 -> 1.23 M; 770 stays 770."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}\u202f{letter}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes in binary units: 1.4 GiB; 0.98 GiB rather than 1003 MiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= 0.9765 * unit:  # three digits of the smaller unit would not do
            return f"{value / unit:.3g}\u202f{name}"
    return f"{value:.0f}\u202fB"


def seconds(value: float) -> str:
    """Seconds as people read them: 0.42 s, 38 s, 4 min 05 s, 1 h 12 min."""
    if value < 10:
        return f"{value:.2g}\u202fs" if value else "0\u202fs"
    if value < 100:
        return f"{value:.0f}\u202fs"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}\u202fmin {rest:02d}\u202fs"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u202fh {minutes:02d}\u202fmin"


def share(value: float) -> str:
    """A share of the base's parameters: 100 %, 1.9 %, 0.034 %."""
    return f"{100 * value:.2g}\u202f%" if value < 0.995 else f"{100 * value:.0f}\u202f%"


def several(number: int, word: str, plural: str | None = None) -> str:
    """1 run, 3 runs."""
    return f"{number} {word if number == 1 else plural or word + 's'}"


def listing(words: list[str]) -> str:
    """a, b and c; with semicolons where a word holds a comma itself."""
    if any("," in word for word in words):
        return "; ".join(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
