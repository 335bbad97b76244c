"""Runs without a bug: any warning or error on one of them is a false alarm."""

from tests.zoo.setting import Setting

SHORT = Setting(steps=60)
RECIPE = Setting(kind="recipe", vocabulary=4096, steps=60)
SFT = Setting(kind="sft", vocabulary=4096, steps=60, batch=2)
TRAINING = {
    "150 steps of the default": Setting(steps=150),
    "rate 1e-4, constant": SHORT.changed(arguments={"learning_rate": 1e-4, "lr_scheduler_type": "constant"}),
    "rate 1e-2": SHORT.changed(arguments={"learning_rate": 1e-2}),
    "warm-up, stable, decay": Setting(
        arguments={"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 20}}
    ),
    "linear without warm-up, no weight decay": SHORT.changed(
        arguments={"lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0}
    ),
    "64 rows of 64": SHORT.changed(batch=64, block=64),
    "4 rows of 1024": SHORT.changed(batch=4, block=1024),
    "8 micro-batches of padded rows": SHORT.changed(rows="padded", batch=2, accumulation=8),
    "bf16, 2 micro-batches": SHORT.changed(batch=4, accumulation=2, arguments={"bf16": True}),
    "bf16 weights, rate 1e-2, constant": Setting(
        sizes={"dtype": "bfloat16"}, arguments={"learning_rate": 1e-2, "lr_scheduler_type": "constant_with_warmup"}
    ),
    "label smoothing, gradient checkpointing": SHORT.changed(
        arguments={"label_smoothing_factor": 0.1, "gradient_checkpointing": True}
    ),
    "Adafactor": SHORT.changed(arguments={"optim": "adafactor"}),
    "SGD": Setting(arguments={"optim": "sgd", "learning_rate": 0.5}),
    "evaluation every 25 steps": Setting(evaluate_every=25),
}
ROWS = {
    "documents kept apart": SHORT.changed(rows="documents"),
    "padded rows of 256": SHORT.changed(rows="padded", batch=4, block=256),
    "prompts that are not scored": SHORT.changed(rows="prompts", evaluate_every=20),
    "rows without padding": SHORT.changed(rows="flattened", batch=4),
    "a stream with 2 workers": SHORT.changed(stream=True, workers=2),
}
MODELS = {
    "GPT-2 with dropout": Setting(family="gpt2", sizes={"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
    "Mistral with a window, documents": SHORT.changed(family="mistral", rows="documents"),
    "Qwen2, untied, rate 5e-3": SHORT.changed(
        family="qwen2", sizes={"tie_word_embeddings": False}, arguments={"learning_rate": 5e-3}
    ),
    "Mixtral": SHORT.changed(family="mixtral"),
    "Mamba-2": SHORT.changed(family="mamba2", block=64),
    "Gemma-2, padded": SHORT.changed(family="gemma2", rows="padded"),
    "BLOOM": SHORT.changed(family="bloom"),
    "BERT as a decoder": SHORT.changed(family="bert"),
    "1.3M parameters, vocabulary 4096": SHORT.changed(
        vocabulary=4096, batch=4, sizes={"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
    ),
    "5M parameters, bytes": SHORT.changed(
        batch=4, block=64, sizes={"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    ),
    "15M parameters, vocabulary 32768": Setting(
        vocabulary=32768,
        batch=4,
        block=64,
        steps=25,
        sizes={"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8},
    ),
}
TEXTS = {
    "vocabulary 300": SHORT.changed(vocabulary=300),
    "vocabulary 1000, untied": SHORT.changed(vocabulary=1000, sizes={"tie_word_embeddings": False}),
    "vocabulary 32768, tied": SHORT.changed(vocabulary=32768, batch=4, block=64),
    "source code": SHORT.changed(text="code"),
    "templates": Setting(text="templates"),
    "templates, vocabulary 1000, rate 1e-2": SHORT.changed(
        text="templates", vocabulary=1000, arguments={"learning_rate": 1e-2}
    ),
    "German in 10 passes": SHORT.changed(text="german", passes=10, block=64),
    "French in 5 passes": SHORT.changed(text="french", passes=5, batch=4, block=64),
    "Spanish in 3 passes, padded": SHORT.changed(text="spanish", passes=3, batch=4, block=64, rows="padded"),
    "random tokens": SHORT.changed(text="random"),
    "random tokens, vocabulary 1000": SHORT.changed(text="random", vocabulary=1000),
    "Markov source, 2 of 64": Setting(text="markov-2", vocabulary=64, steps=150),
    "Markov source, 8 of 2000": SHORT.changed(text="markov-8", vocabulary=2000),
}
PROCESSES = {
    "resumed at step 40": Setting(save_at=40, steps=80),
    "resumed in pass 3 of 5": Setting(save_at=50, passes=5, rows="padded"),
    "2 ranks": SHORT.changed(ranks=2, batch=4),
    "2 ranks, padded, 2 micro-batches": SHORT.changed(ranks=2, batch=2, accumulation=2, rows="padded"),
}
LOOPS = {
    "the recipe, documents kept apart, 2 workers": RECIPE.changed(rows="documents", workers=2),
    "the recipe, source code, into pass 2": RECIPE.changed(
        text="code",
        batch=16,
        steps=120,
        sizes={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        arguments={"eval_skip": 0, "eval_documents": 8},
    ),
    "the recipe, resumed": RECIPE.changed(save_at=30),
    "the recipe, Muon": RECIPE.changed(arguments={"optim": "muon"}),
    "SFTTrainer on text": SFT,
    "SFTTrainer on prompts": SFT.changed(rows="prompts"),
    "SFTTrainer, packed": SFT.changed(arguments={"packing": True}),
}
HEALTHY: dict[str, Setting] = {**TRAINING, **ROWS, **MODELS, **TEXTS, **PROCESSES, **LOOPS}
