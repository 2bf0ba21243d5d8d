"""Coded vectors between server and nodes: both ends of each direction, and what they remember."""
