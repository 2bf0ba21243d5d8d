"""What runs on a node: its settings, its training, its evaluations. Flower is not known here."""
