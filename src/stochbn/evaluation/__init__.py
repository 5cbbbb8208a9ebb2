"""Whole data sets: posteriors fitted to them, what methods predict for them, and their scores."""
