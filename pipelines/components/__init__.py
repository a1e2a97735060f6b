"""Components of our own in a TFX pipeline."""
