"""What both training scripts share."""
