"""The experiments of the paper: networks, data, training, recipes, tables and figures.

These modules need more than the library itself: ``pip install 'stochbn[paper]'``.
"""
