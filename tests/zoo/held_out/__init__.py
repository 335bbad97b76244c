"""The first held-out part: written without sight of the guards while they were frozen (commit c773cf0), from public
reports, and committed before it was scored (25e9ef2).

Its first score is in `first_score.json`: 16 of 42 bugs caught, 10 of the 20 that change what is learned, all 16 under
the right name; 1 false alarm in 61 healthy runs. Guards were then fixed by what it had shown (332b12b), so what
RESULTS.md says of it now is no longer held out.
"""
