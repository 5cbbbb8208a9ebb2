"""The user's network: its batch norms, how it is called, and the copy that passes run on."""
