"""Parameters that should train and do not, and such that train beside their adapters."""

import re
import zlib
from collections.abc import Collection, Iterator

import torch

from recipe.guards import updates
from recipe.guards.gradients import MOVING_ELEMENTS
from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, Verdict
from recipe.guards.head import find_head
from recipe.guards.recording import embeddings_of
from recipe.guards.run import LOW_PRECISION, Parameters
from recipe.guards.updates import FIRST_STEPS, MOVING_RATE, PLAIN_GRADIENT
from recipe.internals import forward_hooks_of


class FrozenParameters(Guard):
    """Parameters that should train do not move, or those under adapters do.

    When: before step 1; after the first 8 steps with a rate above 1e-6, after a resume too; after 16 to 19 steps
        without a gradient; when a parameter is unfrozen.
    Measured: the parameter groups and `requires_grad`, at every step too; in the first steps up to 4,096 elements of
        each parameter before and after the step, and its largest gradient; at every 4th step, whether all have one.
        An error: parameters in no optimizer group, or with a gradient and no movement. A warning: no gradient; more
        than half of a new model frozen, or of the model without gradient later. Information: fewer, layers that
        are trained in turn, and experts without tokens. What PEFT freezes is frozen on purpose; a warning where a
        weight trains that an active adapter adapts, since PEFT saves the adapter alone.
    Try: building the optimizer from the final model, after it was wrapped, cast and resized. Without a gradient: look
        for `detach()` or `no_grad()` on the path to the loss.
    Cannot see: parameters that stop moving later while their gradient is still computed; movement of half-precision
        weights; before step 1, an optimizer outside of torch that keeps copies.
    """

    ids = {"frozen_parameters": "Parameters that should train do not move, or those under adapters do."}
    # Without gradient, after steps that had one. Chosen, not measured: routing finds every expert sooner.
    STOPPED_STEPS = 16
    # Steps between looks at which parameters have a gradient, while all have: some hundred take 0.2 ms. Chosen.
    LOOK_EVERY = 4
    # Of a new model's parameters, excluded on purpose; fixed sinusoidal positions are below it. Chosen, not measured.
    FROZEN_SHARE = 0.5

    def setup(self, run) -> None:
        self.training = [(name, p) for name, p in run.named_parameters if p.requires_grad]
        self._before = self._largest = None
        self._payload: dict = {}
        self._had_all = False  # of `training`, a gradient when they were last looked at
        device = next((p.device for _, p in self.training), None)
        reached = torch.zeros(2, len(self.training), device=device)  # largest gradient in the first steps, has moved
        # num_steps: measured of the first ones, one more once they were sent. steps_without: a gradient, after one
        self.state = {"num_steps": 0, "reached": reached, "steps_without": {}, "takes_turns": False}
        self.optimizer, self._held = run.optimizer, held_by(run.optimizer)
        # Else the optimizer holds copies, or the finding before step 1 is about them.
        is_held = all(id(p) in self._held for _, p in self.training)
        self.unfreezable = [(n, p) for n, p in run.named_parameters if not p.requires_grad] if is_held else []

    def inspect(self, run) -> Iterator[Verdict]:
        finding, held = self.judge_groups(run.named_parameters, run.optimizer), held_by(run.optimizer)
        if finding is None and has_adapters(run.model):
            finding = self.judge_base(run.model, held)
        elif finding is None:
            finding = self._judge_on_purpose(run.named_parameters, run.is_new_model, held)
        yield finding or self.clear(check=PROBE)

    def before_step(self, local) -> None:
        told = {"stopped": self._count_steps_without(local.step), "unfrozen": self._find_unfrozen()}
        self._payload = {name: names for name, names in told.items() if names}
        self._payload |= {"takes_turns": self.state["takes_turns"]} if "stopped" in self._payload else {}
        if not self.training:
            return
        if self.state["num_steps"] == FIRST_STEPS:
            self._payload["reached"] = self.state["reached"]
            self.state["num_steps"] += 1
        elif self.state["num_steps"] < FIRST_STEPS and local.learning_rate > MOVING_RATE:
            self._before = updates.sample_once(local.weights_before, self.training)
            self._largest = updates.largest_gradients(self.training)

    def after_step(self, local) -> None:
        if self._before is None:
            return
        moved = updates.have_moved(self._before, updates.sample_once(local.weights_after, self.training))
        reached = torch.stack([self._largest, moved.to(self._largest)])
        self.state["reached"] = torch.maximum(self.state["reached"], reached)
        self.state["num_steps"] += 1
        self._before = self._largest = None

    def _count_steps_without(self, step: int) -> list[str]:
        """Those that have just had none for STOPPED_STEPS steps."""
        if self._had_all and step % self.LOOK_EVERY:
            return []
        counts, without = self.state["steps_without"], {name for name, p in self.training if p.grad is None}
        self._had_all = not without
        counts |= {name: 0 for name, _ in self.training if name not in without}
        counts |= {name: counts[name] + 1 for name in without if name in counts}
        return [name for name, _ in self.training if name in without and counts.get(name) == self.STOPPED_STEPS]

    def _find_unfrozen(self) -> list[str]:
        """Those that want a gradient by now and are in no group, as when layers are unfrozen in turn (LISA)."""
        wanting = [(n, p) for n, p in self.unfreezable if p.requires_grad]
        self.state["takes_turns"] |= bool(wanting)
        if any(id(p) not in self._held for _, p in wanting):
            self._held = held_by(self.optimizer)  # they may have been added since
        missing = [(n, p) for n, p in wanting if id(p) not in self._held]
        self.unfreezable = [(n, p) for n, p in self.unfreezable if all(p is not other for _, other in missing)]
        return [name for name, _ in missing]

    def measure(self, local) -> dict | None:
        return self._payload or None

    def observe(self, step) -> Iterator[Verdict]:
        measured = step.payload(self) or {}
        if "unfrozen" in measured:
            yield self._in_no_group(measured["unfrozen"], "that were unfrozen", "unfrozen")
        if "stopped" in measured:
            yield self.judge_stopped(self.training, measured["stopped"], measured["takes_turns"])
        if "reached" in measured:
            finding = self.judge(self.training, *measured["reached"], is_cut=cuts_gradients(step.run.model))
            yield finding or self.clear(check="first_steps")

    def save(self) -> dict:
        return {**self.state, "reached": self.state["reached"].cpu().numpy()}

    def load(self, state: dict) -> None:
        """The first steps are measured to their end, or again: the optimizer was built again."""
        fresh = self.state
        super().load({**state, "reached": torch.from_numpy(state["reached"]).to(fresh["reached"])})
        if state["num_steps"] > FIRST_STEPS or state["reached"].shape != fresh["reached"].shape:
            self.state |= {"num_steps": 0, "reached": fresh["reached"]}

    # --- judging

    @classmethod
    def judge_groups(cls, parameters: Parameters, optimizer) -> Finding | None:
        """Every parameter that wants a gradient is in a parameter group.

        `parameters`: of the model as the optimizer got it. Raises `CannotJudge` where an optimizer that is not torch's
        holds none of them: it may keep copies, and `judge` sees whether those come back.
        """
        held, training = held_by(optimizer), [(name, p) for name, p in parameters if p.requires_grad]
        missing = [name for name, p in training if id(p) not in held]
        if parameters and not training:
            causes = ("adapters frozen with their base", "requires_grad_(False) on the whole model")
            action = "model.print_trainable_parameters(); set requires_grad to True for what shall train"
            names = [name for name, _ in parameters]
            return cls._finding("error", "no parameter trains", "at least one", causes, names, PROBE, action)
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if missing and len(missing) == len(training) and not type(inner).__module__.startswith("torch.optim"):
            raise CannotJudge(f"{type(inner).__name__} holds none of the model's parameters itself, perhaps copies")
        return cls._in_no_group(missing, f"of {len(training)}", PROBE) if missing else None

    @classmethod
    def _in_no_group(cls, names: list[str], of: str, check: str) -> Finding:
        causes = (
            "the optimizer was built too early (before the final model)",
            "groups were chosen by name and miss some",
        )
        action = "build the optimizer from the wrapped, cast and resized model, or set requires_grad to False"
        if check != PROBE:
            causes = (
                "the optimizer was built too early (from what trained at the start)",
                "they were put in no group",
            )
            action = "build the optimizer from all parameters that will ever train, or call add_param_group"
        return cls._finding("error", f"{len(names)} parameters {of} in no group", "all", causes, names, check, action)

    @classmethod
    def judge_base(cls, model: torch.nn.Module, held: Collection[int]) -> Finding | None:
        """A checkpoint of PEFT holds adapters, not the weights that they adapt. `held`: ids of what is optimized."""
        names = [name for name, p in adapted_weights(model) if p.requires_grad and id(p) in held]
        if not names:
            return None
        found = f"{len(names)} weights under active adapters train too"
        causes = ("the base was unfrozen (after its adapters were made): what it learns is not saved",)
        action = "leave the base frozen: requires_grad_(True) for the adapters alone; or train without adapters"
        return cls._finding("warning", found, "frozen", causes, names, PROBE, action)

    @classmethod
    def _judge_on_purpose(cls, parameters: Parameters, is_new_model: bool, held: Collection[int]) -> Finding | None:
        """Few parameters of a new model do not want a gradient. Those that the optimizer holds may want one later."""
        frozen = [name for name, p in parameters if not p.requires_grad]
        if not frozen:
            return None
        share = share_of(frozen, parameters)
        is_odd = is_new_model and share > cls.FROZEN_SHARE and not all(id(p) in held for _, p in parameters)
        found = f"{share:.1%} of the parameters frozen"
        expected = f"under {cls.FROZEN_SHARE:.0%} of a new model" if is_odd else "this, if on purpose"
        causes = ("frozen on purpose (fixed positions)", "frozen by an earlier script")
        action = "parameter.requires_grad_(True) for what shall train"
        return cls._finding("warning" if is_odd else "info", found, expected, causes, frozen, PROBE, action)

    @classmethod
    def judge(
        cls, parameters: Parameters, largest: list[float], moved: list[float], is_cut: bool = False
    ) -> Finding | None:
        """Over the first steps every parameter is reached by a gradient, and moves. `largest`: of `largest_gradients`
        over these steps; `moved`: whether each parameter moved in any of them. `is_cut`: see `cuts_gradients`."""
        rows = [(n, p, *row) for (n, p), *row in zip(parameters, largest, moved, strict=True) if p.requires_grad]
        # In low precision it may be a lost update, and few elements may all sit still under small gradients.
        plain = [row for row in rows if row[1].dtype not in LOW_PRECISION and row[1].numel() >= MOVING_ELEMENTS]
        still = [name for name, _, top, has_moved in plain if top > PLAIN_GRADIENT and not has_moved]
        if still:
            found = f"{len(still)} of {len(rows)} with gradient do not move"
            causes = ("optimizer holds other tensors (than the model)", "their group has a learning rate of 0")
            return cls._finding("error", found, "all move", causes, still, "first_steps")
        unreached = [name for name, _, top, has_moved in rows if top == 0.0 and not has_moved]
        causes = ("unused in the forward pass", "detach() or no_grad() on their path to the loss")
        if is_cut:
            causes = ("reentrant checkpointing (of layers whose inputs want no gradient)", *causes)
        found = f"of {len(rows)} without gradient in {FIRST_STEPS} steps"
        return cls._without_gradient(unreached, parameters, found, 0.0, causes, "first_steps") if unreached else None

    @classmethod
    def judge_stopped(cls, parameters: Parameters, stopped: list[str], takes_turns: bool = False) -> Finding:
        """`stopped`: parameters that had a gradient before and have had none for STOPPED_STEPS steps. `takes_turns`:
        others were unfrozen during training, so that these are frozen on purpose."""
        causes = ("requires_grad was set to False", "the forward pass no longer uses them")
        found = f"of {len(parameters)} without gradient for {cls.STOPPED_STEPS} steps"
        max_share = 1.0 if takes_turns else cls.FROZEN_SHARE
        return cls._without_gradient(stopped, parameters, found, max_share, causes, "stopped")

    @classmethod
    def _without_gradient(cls, names, parameters, found: str, max_share: float, causes, check: str) -> Finding:
        """`max_share`: of the elements; so many may be without a gradient on purpose."""
        idle, cut = split_idle(names, parameters)
        if not cut:
            causes = ("experts to which no token is routed",)
            return cls._finding("info", f"{len(idle)} {found}", "few", causes, idle, check)
        severity = "warning" if share_of(cut, parameters) > max_share else "info"
        return cls._finding(severity, f"{len(cut)} {found}", "a gradient", causes, cut, check)

    @classmethod
    def _finding(cls, severity, found: str, expected: str, causes, names: list[str], check: str, action="") -> Finding:
        return cls.finding(
            severity,
            found=f"{found} ({updates.shorten(names[0])})",
            expected=expected,
            causes=causes,
            action=action or "follow the first of them from the forward pass to optimizer.param_groups",
            evidence={"names": names[:20], "count": len(names)},
            check=check,
            cause=f"{causes[0]}: {zlib.crc32(' '.join(names).encode()):x}",  # other parameters are another fault
        )


def held_by(optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def cuts_gradients(model: torch.nn.Module) -> bool:
    """Whether reentrant activation checkpointing gets inputs that want no gradient, as of a frozen embedding: then
    nothing inside the layers has one. `enable_input_require_grads` leaves a hook at the embedding."""
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules() if _is_checkpointed(m)]
    is_reentrant = any(getattr(f, "keywords", {}).get("use_reentrant") for f in functions)
    return is_reentrant and not any(e.weight.requires_grad or forward_hooks_of(e) for e in embeddings_of(model))


def _is_checkpointed(module: torch.nn.Module) -> bool:
    return bool(vars(module).get("gradient_checkpointing"))


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether PEFT put adapters into it: what they adapt is frozen on purpose, also where its weights are new."""
    return hasattr(model, "peft_config") or any("lora_" in name for name, _ in model.named_parameters())


def adapted_weights(model: torch.nn.Module) -> Parameters:
    """The weights that PEFT's active adapters adapt, but for embedding and head, which its checkpoints may hold."""
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    saved = {id(module.weight) for module in (*embeddings, find_head(model)) if hasattr(module, "weight")}
    layers = [(n, m) for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "active_adapters")]
    active = [(n, m.get_base_layer()) for n, m in layers if m.active_adapters and not m.disable_adapters]
    weights = [(f"{name}.weight", getattr(base, "weight", None)) for name, base in active]
    return [(name, w) for name, w in weights if isinstance(w, torch.nn.Parameter) and id(w) not in saved]


def share_of(names: list[str], parameters: Parameters) -> float:
    sizes = {name: parameter.numel() for name, parameter in parameters}
    return sum(sizes[name] for name in names) / max(1, sum(sizes.values()))


def split_idle(names: list[str], parameters: Parameters) -> tuple[list[str], list[str]]:
    """Experts without tokens, and all others of `names`.

    Such an expert is one of a list inside a layer (`layers.0.experts.3.w1`), of which others of the same shape are not
    among `names`. A list at the top is the layers themselves: one of them without gradient is a fault.
    """
    idle = []
    for name in names:
        numbers = list(re.finditer(r"(?<=\.)\d+(?=\.)", name))
        if len(numbers) < 2:
            continue
        begin, end = name[: numbers[-1].start()], name[numbers[-1].end() :]
        sibling = re.compile(re.escape(begin) + r"\d+" + re.escape(end))
        shapes = {other: p.shape for other, p in parameters if sibling.fullmatch(other)}
        if any(other not in names and shape == shapes[name] for other, shape in shapes.items()):
            idle.append(name)
    return idle, [name for name in names if name not in idle]
