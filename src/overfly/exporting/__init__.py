"""Export a trained network, check the file against PyTorch, and run it."""
