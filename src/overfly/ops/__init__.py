"""Functions for methods: losses, pseudo-labels, augmentation, mixing and normalization."""
