"""The two ways a run can fail that are not bugs; `__main__` turns each into one line and its exit code."""


class UserError(ValueError):
    """The user's input cannot be used (exit code 2). The message says what, where and how to mend it."""


class DataError(RuntimeError):
    """Data or disk failed under a good configuration (exit code 4): unreachable, corrupt, changed, full."""
