"""Real-time semantic segmentation of aerial imagery, trained on one domain and adapted to another without labels.

The public names are those of ``__init__.pyi``; each is imported on first access, so that ``import overfly`` needs no
PyTorch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
