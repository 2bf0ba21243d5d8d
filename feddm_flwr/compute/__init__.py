"""The device that a process computes on: which one, how precisely, recorded or not."""
