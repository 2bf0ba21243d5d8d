"""The words that server and nodes use to each other. Neither torch nor Flower."""
