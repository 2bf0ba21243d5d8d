"""What a run leaves for people to look at: its folder, its figures, its report. No torch."""
