"""Where images come from, how they are decoded, and which of them a node has. No torch."""
