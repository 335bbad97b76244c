"""`generate` numbers positions from 0; the forward pass of this family numbers them from pad_token_id + 1."""

import torch
import transformers

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
NAMES = "RobertaForCausalLM RobertaPreLayerNormForCausalLM CamembertForCausalLM Data2VecTextForCausalLM"
NAMES += " XLMRobertaForCausalLM XLMRobertaXLForCausalLM XmodForCausalLM"
transformers.logging.set_verbosity_error()
for name in NAMES.split():
    kind = getattr(transformers, name)
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    model = kind(kind.config_class(**SMALL, **special, is_decoder=True, default_language="en_XX")).eval()
    ids = torch.randint(5, 99, (2, 8))
    made = model.generate(ids, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    forward = model(ids).logits[:, -1]
    same_positions = model(ids, position_ids=torch.arange(8).expand(2, 8)).logits[:, -1]
    gap = (made.logits[0] - forward).abs().max()
    if torch.allclose(made.logits[0], same_positions, atol=1e-5) and gap > 1e-3:
        print(f"CONFIRMED {name}: first generated logits differ by {gap:.3f}; equal with position_ids 0, 1, 2, ...")
