"""What the engine counts and times."""
