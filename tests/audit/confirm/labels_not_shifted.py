"""Labels that equal the input are scored on the token that the position already sees."""

import torch
import transformers

SMALL = dict.fromkeys(("d_model", "hidden_size", "decoder_ffn_dim", "dim_head", "dim_ff"), 32) | {"vocab_size": 99}
SMALL |= dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), 1)
SMALL |= dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4)
SMALL |= {"pad_token_id": 0, "attention_type": "original_full", "suppress_tokens": None, "begin_suppress_tokens": None}
SMALL |= {"emb_dim": 32, "n_layers": 1, "n_heads": 4, "causal": True}
NAMES = "Bart BigBirdPegasus Blenderbot BlenderbotSmall CpmAnt Marian MBart Mvp Pegasus PLBart TrOCR Whisper"
for name in [*(f"{each}ForCausalLM" for each in NAMES.split()), "XLMWithLMHeadModel"]:
    kind = getattr(transformers, name)
    known = kind.config_class().to_dict()
    model = kind(kind.config_class(**{key: value for key, value in SMALL.items() if key in known})).eval()
    ids = torch.randint(5, 99, (2, 24))
    output = model(ids, labels=ids)
    own, following = (
        torch.nn.functional.cross_entropy(output.logits[:, : 24 - k].flatten(0, 1), ids[:, k:].flatten())
        for k in (0, 1)
    )
    if torch.isclose(output.loss, own) and not torch.isclose(output.loss, following):
        print(f"CONFIRMED {name}: loss {output.loss:.4f}, on the same token {own:.4f}, on the next {following:.4f}")
