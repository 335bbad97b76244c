"""Text without a mask or token types: causal in eager, bidirectional in sdpa."""

import torch
import transformers

small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
text = {"model_type": "gemma", "vocab_size": 99, "num_key_value_heads": 4, "head_dim": 8, "initializer_range": 0.2}
parts = {"text_config": small | text, "vision_config": {"image_size": 28, "patch_size": 14} | small}
kind = transformers.PaliGemmaForConditionalGeneration
torch.manual_seed(0)
eager, sdpa = (
    kind._from_config(transformers.PaliGemmaConfig(**parts, image_token_id=98), attn_implementation=name).eval()
    for name in ("eager", "sdpa")
)
sdpa.load_state_dict(eager.state_dict())
ids = torch.randint(5, 98, (1, 16))
other = ids.clone()
other[:, 8:] = (other[:, 8:] + 7) % 90 + 5  # later tokens only
moved = [(model(other).logits - model(ids).logits)[:, :8].abs().max() for model in (eager, sdpa)]
if moved[0] < 1e-5 and moved[1] > 1e-3:
    print(f"CONFIRMED PaliGemmaForConditionalGeneration: logits of places 0 to 7 move with later tokens "
          f"by {moved[0]:.2g} in eager, by {moved[1]:.3f} in sdpa")  # fmt: skip
