"""Whether the Hugging Face hub answers: asked once, before its libraries repeat a request for a minute."""

import os
import sys
from functools import cache

from huggingface_hub import constants, get_session

SECONDS = 10


@cache
def why_unreachable() -> str | None:
    """Why the hub cannot be reached, None where it can. From then on its libraries take what is in their cache, and
    ask nobody."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # a class of the HTTP client for each way a network can fail
        os.environ["HF_HUB_OFFLINE"] = "1"  # of workers, and of `datasets` when it is imported
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return f"{type(error).__name__}: {error}"
    return None


def why_not_loaded(name: str, error: Exception) -> str:
    """Of a tokenizer or model that is no folder here, or cannot be read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if os.path.isdir(name):
        return f"cannot be loaded ({reason})"
    if os.path.isabs(name) or name.count("/") > 1:  # no name of the hub
        return "no such folder"
    offline = why_unreachable()
    if offline is None:
        return f"no such folder, and the hub has none that can be loaded ({reason})"
    return f"no such folder, nor in the cache of the Hugging Face hub, which cannot be reached ({offline[:100]})"
