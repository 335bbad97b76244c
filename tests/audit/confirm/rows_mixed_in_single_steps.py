"""A step of one token with the state of a batch: the rows are broadcast against each other."""

import torch
import transformers

config = transformers.RwkvConfig(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64
)
torch.manual_seed(0)
model = transformers.RwkvForCausalLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
ids = torch.randint(5, 99, (2, 9))
whole = model(ids, use_cache=False).logits[:, -1]
state = model(ids[:, :8], use_cache=True).state
step = model(ids[:, 8:], state=state, use_cache=True).logits
if step.shape[1] != 1 or (step[:, -1] - whole).abs().max() > 1e-2:
    print(f"CONFIRMED RwkvForCausalLM: a step of 2 rows and 1 token gives logits {tuple(step.shape)}; the last "
          f"differ from the forward pass by {(step[:, -1] - whole).abs().max():.3f}")  # fmt: skip
