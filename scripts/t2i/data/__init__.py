"""Images and captions: read, prepared, cached, browsed."""
