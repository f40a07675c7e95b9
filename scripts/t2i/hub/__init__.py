"""Publish models, data sets and Spaces on the Hugging Face Hub."""
