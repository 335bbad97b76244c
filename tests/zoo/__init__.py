"""Seeded silent bugs and healthy runs, on which the guards are scored: docs/zoo.md.

setting.py       Setting: what a run is made of. models.py, texts.py, rows.py make it
run.py           Run: what a bug may change; one run from its beginning to its record
bug.py           Bug
development/     bugs and healthy runs that thresholds were chosen on
held_out*/       those that were written without sight of the guards
cases.py         all of them
others/          what else watches: tools from PyPI, a watchdog
pool.py          runs side by side
score.py         records -> rows and shares; results.py: -> RESULTS.md
__main__.py      the command
"""
