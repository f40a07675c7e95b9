"""The Hugging Face Hub: push, publish, cards, Spaces."""
