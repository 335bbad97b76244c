"""A pretraining recipe on `transformers.Trainer` with guards that detect silent training bugs."""

__version__ = "0.1.0"
