"""The second held-out part: written without sight of the guards after these had been fixed by the first, and frozen
(332b12b); committed before it was scored (f68d213).

Its first score is in `first_score.json`: 7 of 21 bugs caught, 5 of the 14 that change what is learned, all 7 under the
right id, no alarm on 27 healthy runs. Then guards were fixed by what it had shown.
"""
