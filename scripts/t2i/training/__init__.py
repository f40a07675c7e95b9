"""Share code between the two training scripts."""
