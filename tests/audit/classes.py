"""Which classes are audited."""

from typing import NamedTuple

from transformers.models.auto import modeling_auto

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


class Entry(NamedTuple):
    name: str  # of the class
    model_type: str  # of its config
    mapping: str


def find_entries() -> dict[str, Entry]:
    """Every class of the mappings once, by name, with the model type that is its own where several share it."""
    entries: dict[str, Entry] = {}
    for mapping, names in MAPPINGS.items():
        for model_type, name in names.items():
            is_own = model_type.replace("-", "").replace("_", "") in name.lower()
            if name not in entries or (is_own and len(model_type) < len(entries[name].model_type)):
                entries[name] = Entry(name, model_type, entries[name].mapping if name in entries else mapping)
    return dict(sorted(entries.items()))
