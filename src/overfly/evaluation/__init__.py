"""How good a network is, and how fast: counted once, over the whole split."""
