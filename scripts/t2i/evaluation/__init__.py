"""Measure pictures and models."""
