"""Other people's libraries: the overlay where its users already are."""
