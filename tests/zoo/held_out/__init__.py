"""The part that is only scored."""
