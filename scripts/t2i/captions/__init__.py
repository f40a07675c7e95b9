"""Make, store and audit captions."""
