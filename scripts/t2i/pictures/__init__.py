"""Draw, store and arrange pictures, and compile models for fast drawing."""
