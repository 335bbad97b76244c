"""The fifth held-out part, by two authors who had seen neither guards nor earlier parts. Committed before it was
scored; its first score is in `first_score.json`."""
