"""A pretraining recipe on `transformers.Trainer` whose loss can be believed."""

__version__ = "0.1.0"
