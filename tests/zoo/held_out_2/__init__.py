"""The second held-out part: written without sight of the guards after these had been mended by the first, and frozen
(332b12b); committed before it was scored (f68d213)."""
