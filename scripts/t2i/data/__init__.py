"""Read, prepare, cache and browse images and their captions."""
