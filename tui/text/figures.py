"""Figures in few characters, for rows and panes."""


def format_speed(rate: float) -> str:
    """Format tokens/s: 9.5, 140, 2,600."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def format_tokens(count: float) -> str:
    """Format a count of tokens briefly: 812, 3.1k, 104k."""
    if count < 1000:
        return f"{count:.0f}"
    return f"{count / 1000:.1f}k" if count < 10_000 else f"{count / 1000:.0f}k"


def format_size(nbytes: float) -> str:
    """Format a size: 812 B, 3.1 kB, 1.0 MB."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    return f"{nbytes / 1000:.1f} kB" if nbytes < 1_000_000 else f"{nbytes / 1_000_000:.1f} MB"
