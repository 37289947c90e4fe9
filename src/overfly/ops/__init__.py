"""Pure functions: the words that methods are written in."""
