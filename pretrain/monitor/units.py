"""Numbers as people read them."""

SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_count(value: float) -> str:
    """12345 -> 12.3k; a billion is a B."""
    for size, suffix in SUFFIXES:
        if value >= size:
            return f"{value / size:.3g}{'B' if suffix == 'G' else suffix}"
    return f"{value:.3g}"


def format_bytes(value: float) -> str:
    """1.5e9 -> 1.5 GB."""
    for size, suffix in SUFFIXES:
        if value >= size:
            return f"{value / size:.3g} {suffix}B"
    return f"{value:.0f} B"


def format_seconds(value: float) -> str:
    """The two largest units: 3 d 4 h, 2 h 5 min, 12 s, 0.4 s."""
    if value < 10:
        return f"{value:.1f} s"
    seconds = round(value)
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // below
            return f"{seconds // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds} s"
