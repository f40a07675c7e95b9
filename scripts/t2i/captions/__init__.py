"""Captions: made, kept, audited."""
