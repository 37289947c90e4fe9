"""The one loop, and the folder that it fills."""
