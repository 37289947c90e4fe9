"""One self-contained HTML report of some runs."""
