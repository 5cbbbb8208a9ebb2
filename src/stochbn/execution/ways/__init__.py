"""The faster ways to make passes. Each module says what it does, which networks it applies to, and its error."""
