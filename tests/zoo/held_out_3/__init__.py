"""The third held-out part: written without sight of the guards after these had been fixed by the second, and frozen
(0383ba3); committed before it was scored (a762122).

Its first score is in `first_score.json`: 11 of 16 bugs caught, 7 of the 11 that change what is learned, 10 under the
right id, no alarm on 21 healthy runs.
"""
