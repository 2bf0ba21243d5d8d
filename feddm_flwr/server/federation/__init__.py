"""Everything of Flower's transport: who takes part, what is sent, what comes back."""
