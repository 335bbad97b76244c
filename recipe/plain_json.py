"""JSON as the standard has it: NaN and infinity, which it lacks, become null; and without credentials.

Strings are redacted before they are escaped: a quote or a letter beyond ASCII would hide part of a password.
"""

import json
import math

from recipe.redact import redact_all


def dumps(value, **options) -> str:
    """`json.dumps` of what may hold numbers that are not finite."""
    value = redact_all(value)
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(without_nan(value), allow_nan=False, **options)


def without_nan(value):
    """A copy with None for each float that is not finite."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
