"""The experiments of the paper: networks, data, training, recipes, tables and figures.

These modules need more than the library itself: ``pip install 'stochbn[paper]'``.
"""

__all__ = ["ExperimentError"]


class ExperimentError(RuntimeError):
    """What went wrong in an experiment and can be mended by who runs it; the message says how."""
