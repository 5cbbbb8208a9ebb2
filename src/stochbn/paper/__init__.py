"""The experiments of the paper: recipes, training, runs and comparisons; imported by nothing but their own commands."""
