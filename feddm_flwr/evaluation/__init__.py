"""What a model is worth: samples of it, and their distance to real images."""
