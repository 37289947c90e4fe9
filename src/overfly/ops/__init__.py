"""Pure functions that methods are written with."""
