"""Further runs without a bug, unusual ones: any warning or error on one of them is a false alarm."""

from tests.zoo.setting import Setting

SHORT = Setting(steps=60)
DROPOUT = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
HEALTHY: dict[str, Setting] = {
    "4 rows of 64, rate 1e-2, beta2 0.9": Setting(
        batch=4, block=64, arguments={"learning_rate": 1e-2, "adam_beta2": 0.9}
    ),
    "warm-up over all of the steps": Setting(steps=80, arguments={"warmup_steps": 80}),
    "GPT-2, all dropouts 0.3, evaluated every 5 steps": SHORT.changed(
        family="gpt2", sizes=DROPOUT, evaluate_every=5, batch=4
    ),
    "16 micro-batches of one padded row": SHORT.changed(rows="padded", batch=1, accumulation=16, steps=50),
    "weight decay 1.0": SHORT.changed(arguments={"weight_decay": 1.0}),
    "clipped at 0.05": SHORT.changed(arguments={"max_grad_norm": 0.05}),
    "5 restarts of the cosine, documents kept apart": Setting(
        rows="documents",
        arguments={"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 5}},
    ),
    "2 rows of 2048 in 20 steps": Setting(batch=2, block=2048, steps=20, arguments={"warmup_steps": 4}),
    "short documents kept apart, Markov source, 3 of 64": SHORT.changed(
        text="markov-3", vocabulary=64, rows="documents", block=512, batch=4, steps=50
    ),
    "SGD with Nesterov's momentum, padded": Setting(
        rows="padded",
        arguments={"optim": "sgd", "optim_args": "momentum=0.95,nesterov=True", "learning_rate": 0.05},
    ),
    "random tokens, vocabulary 500, 2 micro-batches": SHORT.changed(
        text="random", vocabulary=500, batch=4, accumulation=2
    ),
    "Markov source, 16 of 2000, evaluated": SHORT.changed(text="markov-16", vocabulary=2000, evaluate_every=20),
    "templates in 6 passes, rate 1e-2, constant": SHORT.changed(
        text="templates",
        passes=6,
        batch=4,
        block=64,
        arguments={"learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    ),
    "one layer, one head, resumed at step 20, gradient checkpointing": SHORT.changed(
        save_at=20,
        sizes={"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
        arguments={"gradient_checkpointing": True},
    ),
}
