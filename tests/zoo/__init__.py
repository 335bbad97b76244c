"""Seeded bugs and healthy runs of tiny models: who sees what, and when."""
