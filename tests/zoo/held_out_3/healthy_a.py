"""Unusual runs that are as their users want them."""

import torch
from transformers import TrainerCallback

from tests.zoo.rows import make_rows
from tests.zoo.run import Run
from tests.zoo.setting import Setting

SHORT = Setting(steps=60)
PREFIX, SUFFIX, MIDDLE = (torch.tensor([byte]) for byte in (1, 2, 3))  # bytes that no text has


def layers_dropped(run: Run):
    """LayerDrop: in training each layer is left out of a fifth of the forward passes (Fan et al. 2019)."""

    def leave_out(module, inputs, output):
        return inputs[0] if module.training and torch.rand(()) < 0.2 else output

    for layer in run.model.model.layers:
        layer.register_forward_hook(leave_out)


def rearranged_for_infilling(run: Run):
    """Half of the rows are given as prefix, suffix, middle, with a token before each part (Bavarian et al. 2022)."""
    generator = torch.Generator().manual_seed(0)
    for row in run.train_dataset[::2]:
        ids = row["input_ids"][:-3]
        first, last = torch.randint(1, len(ids), (2,), generator=generator).sort().values.tolist()
        parts = [PREFIX, ids[:first], SUFFIX, ids[last:], MIDDLE, ids[first:last]]
        row["input_ids"] = torch.cat(parts)
        row["labels"] = row["input_ids"].clone()


def longer_rows_by_and_by(run: Run):
    """Rows are cut to 32 tokens up to step 15, to 64 up to step 30, and are whole from then on."""
    collate, length = run.collator, 32

    class Lengthen(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            nonlocal length
            length = 32 if state.global_step < 15 else 64 if state.global_step < 30 else run.setting.block

    run.collator = lambda rows: {name: values[:, :length] for name, values in collate(rows).items()}
    run.callbacks.append(Lengthen())


def evaluated_on_code(run: Run):
    """The eval set is source code: how well the model does on what it is not trained on."""
    run.eval_dataset = make_rows(run.setting.changed(text="code"), is_eval=True)


def no_positions(run: Run):
    """Nothing but the causal mask tells the positions apart (NoPE, Kazemnejad et al. 2023)."""

    def unrotated(module, inputs, output):
        cos, sin = output
        return torch.ones_like(cos), torch.zeros_like(sin)

    run.model.model.rotary_emb.register_forward_hook(unrotated)


HEALTHY: dict[str, Setting] = {
    "layers dropped, 6 layers": SHORT.changed(change=layers_dropped, sizes={"num_hidden_layers": 6}),
    "half of the rows for infilling": SHORT.changed(change=rearranged_for_infilling),
    "rows that grow longer": SHORT.changed(change=longer_rows_by_and_by),
    "trained on English, evaluated on code": SHORT.changed(change=evaluated_on_code, evaluate_every=20),
    "no position embeddings, padded": SHORT.changed(change=no_positions, rows="padded"),
}
