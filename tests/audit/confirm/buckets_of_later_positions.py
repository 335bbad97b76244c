"""Logits of early positions move with later tokens of the decoder."""

import torch
import transformers

config = transformers.ProphetNetConfig(
    vocab_size=99, hidden_size=32, num_encoder_layers=1, num_decoder_layers=2, num_encoder_attention_heads=4,
    num_decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.2,
)  # fmt: skip
torch.manual_seed(0)
ids = torch.randint(5, 99, (1, 24))
other = ids.clone()
other[:, 5:] = (other[:, 5:] + 7) % 90 + 5  # later tokens only
for name in ("ProphetNetForCausalLM", "ProphetNetForConditionalGeneration"):
    model = getattr(transformers, name)(transformers.ProphetNetConfig(**config.to_dict())).eval()
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    first, second = (model(**{"input_ids": ids, "use_cache": False, key: each}).logits[:, :5] for each in (ids, other))
    moved = (second - first).abs().amax(dim=(0, 2))
    if moved.max() > 1e-2 * first.std():
        print(f"CONFIRMED {name}: logits of places 0 to 4 move with later tokens by up to {moved.max():.3f} "
              f"(sd {first.std():.3f})")  # fmt: skip
