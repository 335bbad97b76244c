"""Public reports of silent training bugs, and of trainings that the guards once judged wrongly, as small programs.

report.py     Report
given.py      reports that the guards were fixed with
found.py      reports that were looked for afterwards, and that no guard was changed for
__main__.py   the command; writes docs/reports.md

The runs are those of tests/zoo (`Run`, `Setting`), without its other tools.
"""
