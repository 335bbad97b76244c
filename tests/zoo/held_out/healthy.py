"""Runs without a bug that no threshold was chosen on: any warning or error on one of them is a false alarm."""

from tests.zoo.setting import Setting

SHORT = Setting(steps=60)
SMALL = Setting(block=64, sizes={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2})
WIDER = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
LARGE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
RECIPE = Setting(kind="recipe", vocabulary=4096, steps=60)
SFT = Setting(kind="sft", vocabulary=4096, steps=50, batch=2)
TRAINING = {
    "Adagrad, rate 2e-2": SHORT.changed(arguments={"optim": "adagrad", "learning_rate": 2e-2}),
    "RMSprop, linear, 0.7M parameters": SHORT.changed(
        batch=4, sizes=WIDER, arguments={"optim": "rmsprop", "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    ),
    "SGD with momentum, German in 8 passes": SHORT.changed(
        text="german",
        passes=8,
        block=64,
        arguments={"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1, "weight_decay": 0.0},
    ),
    "Adafactor, vocabulary 500, untied": SHORT.changed(
        vocabulary=500,
        sizes={"tie_word_embeddings": False},
        arguments={"optim": "adafactor", "learning_rate": 5e-3, "lr_scheduler_type": "constant_with_warmup"},
    ),
    "64 rows of 64, rate 1e-4 that falls as a polynomial, beta2 0.999": SHORT.changed(
        batch=64,
        block=64,
        steps=40,
        arguments={
            "optim": "adamw_torch",
            "learning_rate": 1e-4,
            "lr_scheduler_type": "polynomial",
            "adam_beta2": 0.999,
        },
    ),
    "rate 2e-2 over the root of the step, clipped at 0.3": SMALL.changed(
        steps=120, arguments={"learning_rate": 2e-2, "lr_scheduler_type": "inverse_sqrt", "max_grad_norm": 0.3}
    ),
    "300 steps, 3 restarts of the cosine, never clipped": SMALL.changed(
        steps=300,
        arguments={
            "lr_scheduler_type": "cosine_with_restarts",
            "lr_scheduler_kwargs": {"num_cycles": 3},
            "max_grad_norm": 0.0,
        },
    ),
    "200 steps, cosine to a tenth, French in 20 passes": SMALL.changed(
        steps=200,
        text="french",
        passes=20,
        arguments={"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    ),
    "320 steps at a constant rate, evaluated 8 times": SMALL.changed(
        steps=320, evaluate_every=40, arguments={"lr_scheduler_type": "constant_with_warmup", "weight_decay": 0.0}
    ),
    "bf16 on padded rows, 4 micro-batches, NEFTune": SHORT.changed(
        rows="padded", batch=2, accumulation=4, arguments={"bf16": True, "neftune_noise_alpha": 5.0}
    ),
    "label smoothing, evaluated at the start and every 10 steps": SHORT.changed(
        evaluate_every=10, arguments={"label_smoothing_factor": 0.05, "eval_on_start": True}
    ),
}
ROWS = {
    "padded rows of 64, Russian in 12 passes": SHORT.changed(
        text="russian", rows="padded", batch=16, block=64, steps=48, passes=12
    ),
    "documents kept apart in rows of 512, activation checkpointing": SHORT.changed(
        rows="documents", batch=4, block=512, steps=50, arguments={"activation_checkpointing": True}
    ),
    "prompts, 8 micro-batches, code, constant rate": SHORT.changed(
        text="code",
        rows="prompts",
        batch=2,
        accumulation=8,
        steps=40,
        arguments={"lr_scheduler_type": "constant", "learning_rate": 1e-3, "warmup_steps": 0},
    ),
    "rows without padding, grouped by length": SHORT.changed(
        rows="flattened", batch=4, accumulation=2, arguments={"train_sampling_strategy": "group_by_length"}
    ),
    "a stream without workers, documents": SHORT.changed(stream=True, rows="documents"),
    "a stream with 3 workers, padded, vocabulary 2000, 2M parameters": SHORT.changed(
        stream=True,
        workers=3,
        rows="padded",
        vocabulary=2000,
        batch=4,
        steps=40,
        sizes=LARGE,
        arguments={"learning_rate": 2e-3},
    ),
}
MODELS = {
    "Qwen3, 4 rows of 1024, vocabulary 500": SHORT.changed(
        family="qwen3", vocabulary=500, batch=4, block=1024, steps=25
    ),
    "Mixture of experts (Qwen3), evaluated": SHORT.changed(
        family="qwen3_moe", evaluate_every=30, sizes={"output_router_logits": True}
    ),
    "OLMo-2, 2M parameters, warm-up, stable, decay": SHORT.changed(
        family="olmo2",
        batch=4,
        sizes=LARGE,
        arguments={
            "learning_rate": 2e-3,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 15},
        },
    ),
    "Gemma-3 with a window, rows of 256": SHORT.changed(family="gemma3_text", batch=4, block=256, steps=50),
    "Phi, prompts": SHORT.changed(family="phi", rows="prompts"),
    "OPT with dropout, padded": SHORT.changed(family="opt", rows="padded", sizes={"dropout": 0.1}),
    "Falcon, templates": SHORT.changed(family="falcon", text="templates", block=64),
    "Mamba, 4 rows of 64": SHORT.changed(family="mamba", batch=4, block=64, steps=45),
    "RWKV, 4 rows of 64": SHORT.changed(family="rwkv", batch=4, block=64),
    "RecurrentGemma, rate 1e-3": SHORT.changed(
        family="recurrent_gemma", batch=4, block=64, arguments={"learning_rate": 1e-3}
    ),
    "GPT-NeoX, bf16, into pass 3": SHORT.changed(
        family="gpt_neox", text="code", passes=3, arguments={"bf16": True, "learning_rate": 1e-3, "adam_beta2": 0.999}
    ),
    "13M parameters, vocabulary 4096, 2 micro-batches": Setting(
        vocabulary=4096,
        batch=2,
        accumulation=2,
        block=64,
        steps=25,
        sizes={"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8},
        arguments={"learning_rate": 1e-3},
    ),
    "vocabulary 32768, untied, hidden 96": SHORT.changed(
        vocabulary=32768, batch=4, block=64, steps=40, sizes={"tie_word_embeddings": False, "hidden_size": 96}
    ),
}
TEXTS = {
    "random tokens, vocabulary 8000": SHORT.changed(text="random", vocabulary=8000, batch=4, block=64),
    "Markov source, 4 of 500, padded": SHORT.changed(text="markov-4", vocabulary=500, rows="padded", steps=100),
}
PROCESSES = {
    "a stream resumed at step 10, 1 worker": Setting(stream=True, workers=1, save_at=10, steps=60),
    "resumed in pass 7 of 8, dropout, Spanish": Setting(
        family="gpt_bigcode", text="spanish", passes=8, save_at=65, steps=80, block=64
    ),
    "2 ranks, evaluated, documents": SHORT.changed(ranks=2, batch=4, rows="documents", evaluate_every=20),
    "2 ranks, prompts, 4 micro-batches": SHORT.changed(ranks=2, batch=2, accumulation=4, rows="prompts", steps=40),
    "2 ranks on a stream, MPT": SHORT.changed(ranks=2, batch=4, stream=True, family="mpt"),
}
LOOPS = {
    "the recipe, rows of 64, evaluated every 15 steps, 1 worker": RECIPE.changed(
        block=64, workers=1, steps=45, evaluate_every=15, arguments={"eval_documents": 8}
    ),
    "the recipe, resumed late, documents, 2 workers": RECIPE.changed(rows="documents", workers=2, save_at=50),
    "SFTTrainer without padding": SFT.changed(block=512, arguments={"padding_free": True, "max_length": None}),
    "SFTTrainer on prompts, all of them scored": SFT.changed(
        rows="prompts", accumulation=2, arguments={"completion_only_loss": False}
    ),
    "SFTTrainer, packed and cut into rows of 256, chunked loss": SFT.changed(
        block=256,
        steps=40,
        arguments={"packing": True, "packing_strategy": "wrapped", "loss_type": "chunked_nll", "learning_rate": 1e-3},
    ),
}
HEALTHY: dict[str, Setting] = {**TRAINING, **ROWS, **MODELS, **TEXTS, **PROCESSES, **LOOPS}
