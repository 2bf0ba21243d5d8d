"""What runs on the server: rounds, evaluation, and what a run leaves."""
