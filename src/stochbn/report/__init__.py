"""What an evaluation looks like: one style for all figures, sentences about scores, and a page that holds all of it."""
