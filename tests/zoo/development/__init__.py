"""The part that thresholds were chosen on."""
