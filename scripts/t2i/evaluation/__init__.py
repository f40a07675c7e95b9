"""Measures of pictures and models."""
