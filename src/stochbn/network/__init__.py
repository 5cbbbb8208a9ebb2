"""What a network of a user is: its batch norms, how it is called, and the copy of it that passes run on."""
