"""How float32 values become few bytes, and the frame that carries them."""
