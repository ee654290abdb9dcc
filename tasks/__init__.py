"""The tasks, one file per family: source, reading, score."""
