"""Guards against silent training bugs, for any `transformers.Trainer`:
`trainer.add_callback(RegressionCallback())`."""

from recipe.guards.callback import RegressionCallback
from recipe.guards.finding import FINDING_IDS, Finding

__all__ = ["FINDING_IDS", "Finding", "RegressionCallback"]
