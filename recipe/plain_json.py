"""JSON as the standard has it: NaN and infinity, which it lacks, become null; and without credentials."""

import json
import math

from recipe.redact import redact


def dumps(value, **options) -> str:
    """`json.dumps` of what may hold numbers that are not finite."""
    try:
        text = json.dumps(value, allow_nan=False, **options)
    except ValueError:
        text = json.dumps(without_nan(value), allow_nan=False, **options)
    return redact(text)


def without_nan(value):
    """A copy with None for each float that is not finite."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
