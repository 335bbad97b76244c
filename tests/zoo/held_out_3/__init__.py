"""The third held-out part: written without sight of the guards after these had been mended by the second, and frozen;
committed before it was scored."""
