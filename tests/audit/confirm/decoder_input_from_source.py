"""Called with `labels` alone, the decoder reads the shifted source, not the shifted labels."""

import torch
import transformers

config = transformers.FSMTConfig(
    langs=["en", "de"], src_vocab_size=99, tgt_vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
)  # fmt: skip
model = transformers.FSMTForConditionalGeneration(config).eval()
source, labels, others = torch.randint(5, 99, (3, 2, 16))
first, second = (model(source, labels=each).logits for each in (labels, others))
right = model.prepare_decoder_input_ids_from_labels(labels)
forced = model(source, labels=labels, decoder_input_ids=right).logits
if torch.equal(first, second) and not torch.allclose(first, forced, atol=1e-3):
    print("CONFIRMED FSMTForConditionalGeneration: logits are the same for any labels; with decoder_input_ids from "
          f"the labels they differ by {(first - forced).abs().max():.3f}")  # fmt: skip
