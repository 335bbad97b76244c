"""Packed documents: a position sees the compressed keys of the document before, and none of its own."""

import torch
import transformers

config = transformers.DeepseekV4Config(
    vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=16, qk_rope_head_dim=8,
    q_lora_rank=16, o_lora_rank=16, o_groups=2, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    index_n_heads=4, index_head_dim=16, index_topk=8, sliding_window=8, hc_mult=2, use_cache=False,
    layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 4},
    mlp_layer_types=["moe", "moe", "moe"],
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
torch.manual_seed(0)
model = transformers.DeepseekV4ForCausalLM._from_config(config, attn_implementation="eager").eval()
ids, places = torch.randint(5, 99, (1, 48)), torch.arange(24).repeat(2)[None]
other = ids.clone()
other[:, :24] = (other[:, :24] + 7) % 90 + 5  # the first document only
before, after = (model(each, position_ids=places).logits[:, 24:] for each in (ids, other))
plain = model(ids[:, 24:]).logits
moved, apart = (after - before).abs().max(), (before - plain).abs().max()
if moved > 1e-3 * before.std():
    print(f"CONFIRMED DeepseekV4ForCausalLM: logits of document 2 move by {moved:.4f} with document 1 (sd "
          f"{before.std():.4f}), and differ by {apart:.4f} from the document alone")  # fmt: skip
