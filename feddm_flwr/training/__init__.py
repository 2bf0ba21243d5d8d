"""What a node's model learns: objectives, the optimizer step, the local loop."""
