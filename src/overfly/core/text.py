"""Numbers as text."""


def percent(value: float | None, digits: int = 2) -> str:
    """Return a share in percent, without the sign; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}"
