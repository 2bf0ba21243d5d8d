"""What is kept on a disk: whole files, checkpoints, a machine's state folder, cached arrays."""
