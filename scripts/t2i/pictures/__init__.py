"""Pictures: drawn, compiled, stored, laid out as grids."""
