"""The faster ways of making passes: what each applies to, what it does, and what error it may make."""
