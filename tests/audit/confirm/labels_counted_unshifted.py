"""Trainer counts all labels of models that score one less in each row, as `loss_type` is unknown: the loss is low."""

import torch
import transformers

SMALL = dict.fromkeys("n_embd hidden_size d_model dff intermediate_size embedding_size feed_forward_size".split(), 32)
SMALL |= dict.fromkeys("n_layer num_hidden_layers n_layers".split(), 1) | {"attention_head_size": 8}
SMALL |= dict.fromkeys("n_head num_attention_heads n_heads".split(), 4) | {"vocab_size": 99, "is_decoder": True}
SMALL |= {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local"], "pad_token_id": 0}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8}
NAMES = "GPT2LMHeadModel BertLMHeadModel BertGenerationDecoder CTRLLMHeadModel OpenAIGPTLMHeadModel"
NAMES += " ReformerModelWithLMHead"
transformers.logging.set_verbosity_error()
for name in NAMES.split():
    kind = getattr(transformers, name)
    known = kind.config_class().to_dict()
    model = kind(kind.config_class(**{key: value for key, value in SMALL.items() if key in known})).eval()
    arguments = transformers.TrainingArguments("unused", use_cpu=True, report_to="none")
    trainer = transformers.Trainer(model, arguments)
    ids = torch.randint(5, 99, (2, 16))
    _, count = trainer.get_batch_samples(iter([{"input_ids": ids, "labels": ids}]), 1, "cpu")
    mean, step = model(ids, labels=ids).loss, model(ids, labels=ids, num_items_in_batch=count).loss
    if count == 32 and torch.isclose(step * 32, mean * 30):
        print(f"CONFIRMED {name}: 30 labels are scored, Trainer counts {count}; loss {step:.4f} instead of {mean:.4f}")
