"""Adam, AdamW and Muon against their definition: silent on every way in which torch computes them, not on others."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from recipe import muon as recipe_muon
from recipe.guards.adam import OptimizerOff
from recipe.guards.guard import Clear, NotApplicable
from recipe.muon import Muon


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 50))


def step(model, optimizer, size=1.0):
    optimizer.zero_grad()
    ids = torch.randint(50, (4, 8))
    loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    (size * loss).backward()
    optimizer.step()


def set_up(model, optimizer) -> OptimizerOff:
    guard = OptimizerOff()
    facts = dict(inner_optimizer=optimizer, optimizer=optimizer, named_parameters=list(model.named_parameters()))
    is_adam = "adam" in type(optimizer).__name__.lower()
    guard.setup(
        SimpleNamespace(**facts, is_loss_scaled=False, is_main=True, is_adam=is_adam, is_sharded=False, world_size=1)
    )
    return guard


def judged(guard) -> list:
    """What the guard yields after a step."""
    measured = guard.measure(None)
    assert guard.failure is None
    values = None if measured is None else {name: each.tolist() for name, each in measured.items()}
    step = SimpleNamespace(payload=lambda _: values)
    return [None if isinstance(verdict, Clear) else verdict for verdict in guard.observe(step)]


def watch_steps(model, optimizer, num_steps=15, **how):
    """The numbers of the steps that are compared and at fault, each with its finding."""
    guard, found = set_up(model, optimizer), []
    for number in range(1, num_steps + 1):
        step(model, optimizer, **how)
        found += [(number, finding) for finding in judged(guard)]
    guard.close()
    assert len(found) == min(num_steps, 12)
    return [(number, finding) for number, finding in found if finding is not None]


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize(
    "settings",
    [
        {"foreach": True},
        {"foreach": False},
        {"fused": True},
        {"lr": torch.tensor(1e-3), "foreach": False},
        {"lr": 1e-9},  # at the start of a warm-up: less than the weights' rounding
        {"lr": 0.0},
        {"betas": (0.9, 0.95), "weight_decay": 0.5, "eps": 1e-4},
        {"betas": (0.0, 0.999)},
    ],
)
def test_the_published_algorithm_is_silent(kind, settings):
    model = make_model()
    assert not watch_steps(model, kind(model.parameters(), **{"lr": 1e-3, "weight_decay": 0.1, **settings}))


def test_adam_asked_to_decouple_its_decay_is_silent():
    model = make_model()
    optimizer = Adam(model.parameters(), lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True)
    assert not watch_steps(model, optimizer)


def test_tiny_gradients_and_a_restored_state_are_silent():
    model = make_model()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    assert not watch_steps(model, optimizer, size=1e-12)
    restored = AdamW(model.parameters(), lr=1e-3)
    restored.load_state_dict(optimizer.state_dict())
    assert not watch_steps(model, restored)


def test_a_parameter_without_gradient_in_some_steps_is_silent():
    model = make_model()
    optimizer = AdamW([model[3].bias], lr=1e-3)
    guard = set_up(model, optimizer)
    for number in range(6):
        step(model, optimizer)
        model[3].bias.requires_grad_(number % 2 == 0)
        model[3].bias.grad = None
        assert judged(guard) == [None]


def couples_decay(optimizer):
    for group in optimizer.param_groups:
        group["decoupled_weight_decay"] = False


def counts_from_a_million(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.tensor(1e6), **moments}


def forgets_its_moments(optimizer):
    own = optimizer._init_group

    def init_group(*args):
        for state in optimizer.state.values():
            state["exp_avg"] *= 0.5
        return own(*args)

    optimizer._init_group = init_group


@pytest.mark.parametrize(
    ("change", "part"),
    [(couples_decay, "first moment"), (counts_from_a_million, "step"), (forgets_its_moments, "first moment")],
)
def test_another_algorithm_is_found_at_once(change, part):
    model = make_model()
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    change(optimizer)
    number, first = watch_steps(model, optimizer)[0]
    assert (first.id, first.severity, first.evidence["part"]) == ("optimizer_off", "warning", part)
    assert number <= 2


def test_somebody_elses_hook_after_the_step_is_not_applicable():
    model = make_model()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad(set_to_none=False))
    with pytest.raises(NotApplicable, match="hook"):
        set_up(model, optimizer)


def clears(optimizer, earlier):
    optimizer.state.clear()


def clears_one(optimizer, earlier):
    optimizer.state.pop(optimizer.param_groups[0]["params"][1])


def rolls_back(optimizer, earlier):
    optimizer.load_state_dict(earlier)


@pytest.mark.parametrize("change", [clears, clears_one, rolls_back])
@pytest.mark.parametrize("at", [1, 5, 50])
def test_state_that_is_cleared_or_loaded_in_between_is_silent(change, at):
    model = make_model()
    optimizer = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999))
    for _ in range(3):
        step(model, optimizer)
    earlier = copy.deepcopy(optimizer.state_dict())
    guard = set_up(model, optimizer)
    for number in range(1, 101):
        if number == at:
            change(optimizer, earlier)
        step(model, optimizer)
        assert judged(guard) in ([], [None])


def test_hooks_are_taken_off():
    model = make_model()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    set_up(model, optimizer).close()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("kind", [SGD, type("Cautious", (AdamW,), {})])
def test_another_class_may_compute_something_else(kind):
    model = make_model()
    with pytest.raises(NotApplicable, match=kind.__name__):
        set_up(model, kind(model.parameters(), lr=1e-3))


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_weight_that_is_given_twice_is_an_error(kind):
    model = make_model()
    named, optimizer = list(model.named_parameters()), kind(model.parameters(), lr=1e-3)
    assert OptimizerOff.judge_repeated(named, optimizer) is None
    optimizer.param_groups[0]["params"].append(named[0][1])
    finding = OptimizerOff.judge_repeated(named, optimizer)
    assert finding.severity == "error" and finding.found.startswith("1 parameters repeated")
    del optimizer.param_groups[0]["params"][1]
    assert OptimizerOff.judge_repeated(named, optimizer) is None  # one is missing, which another guard says


@pytest.mark.parametrize(
    ("betas", "found"), [((0.95, 0.9), True), ((0.9, 0.9), False), ((0.9, 0.95), False), ((0.0, 0.99), False)]
)
def test_betas_given_for_each_other(betas, found):
    finding = OptimizerOff.judge_betas([{"betas": betas}])
    assert (finding is not None) is found
    assert not found or finding.id == "optimizer_off"
    assert OptimizerOff.judge_betas([{"momentum": 0.9}]) is None


# --- decay of other optimizers


class OwnAdamW(torch.optim.Optimizer):
    """`scaled`: the decay is multiplied by the rate. It keeps numbers and a list of its own."""

    def __init__(self, parameters, lr=1e-2, weight_decay=0.1, scaled=True):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.scaled, self.count, self.seen = scaled, 0, []

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        self.seen.append(torch.rand(1))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["m"] = p.grad.clone()
                p.mul_(1 - group["weight_decay"] * (group["lr"] if self.scaled else 1.0)).sub_(p.grad * group["lr"])


def test_decay_without_the_rate_is_found_and_leaves_the_optimizer_as_it_is():
    optimizer = OwnAdamW(make_model().parameters(), scaled=False)
    weights = [p.clone() for p in optimizer.param_groups[0]["params"]]
    before = torch.get_rng_state()
    finding = OptimizerOff.judge_decay(optimizer)
    assert finding.severity == "warning" and finding.found.startswith("each step takes 0.1 off")
    assert (optimizer.count, optimizer.seen, len(optimizer.state)) == (0, [], 0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, weights, optimizer.param_groups[0]["params"]))


class Failing(OwnAdamW):
    def step(self, closure=None):
        raise RuntimeError("needs the whole model")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (OwnAdamW, {}),
        (OwnAdamW, {"scaled": False, "weight_decay": 1e-4}),  # decoupled from the rate on purpose
        (OwnAdamW, {"scaled": False, "weight_decay": 0.0}),
        (Failing, {"scaled": False}),
        (AdamW, {"weight_decay": 0.1}),
    ],
)
def test_other_decay_is_silent(kind, settings):
    assert OptimizerOff.judge_decay(kind(make_model().parameters(), **settings)) is None


# --- Muon


def make_muon(model, lr=1e-2) -> Muon:
    """The linear weights by Muon, all else by AdamW."""
    matrices = [model[1].weight]
    others = [p for p in model.parameters() if p is not matrices[0]]
    groups = [{"params": matrices, "momentum": 0.95}, {"params": others, "betas": (0.9, 0.95), "eps": 1e-8}]
    return Muon([{**group, "weight_decay": 0.1} for group in groups], lr=lr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_silent(monkeypatch, dtype):
    monkeypatch.setattr(recipe_muon, "fast_dtype", lambda device: dtype)
    model = make_model()
    assert not watch_steps(model, make_muon(model))


@pytest.mark.parametrize(
    "settings", [{"adjust_lr_fn": "match_rms_adamw"}, {"adjust_lr_fn": "original"}, {}, {"nesterov": False}]
)
def test_torchs_muon_is_silent(settings):
    model = make_model()
    assert not watch_steps(model, torch.optim.Muon([model[1].weight, model[3].weight], lr=1e-2, **settings))


def skips_orthogonalization(monkeypatch):
    monkeypatch.setattr(recipe_muon, "orthogonalize", lambda m, dtype=None: 4 * m / torch.linalg.matrix_norm(m))


def scales_otherwise(monkeypatch):
    monkeypatch.setattr(recipe_muon, "RMS", 0.25)


def adds_all_of_the_gradient(monkeypatch):
    own = torch.Tensor.lerp_
    monkeypatch.setattr(torch.Tensor, "lerp_", lambda a, b, w: own(a, b, 1.0 if w < 0.5 else w))


@pytest.mark.parametrize(
    ("change", "part"),
    [(skips_orthogonalization, "step"), (scales_otherwise, "step"), (adds_all_of_the_gradient, "momentum")],
)
def test_another_muon_is_found_at_once(monkeypatch, change, part):
    model = make_model()
    optimizer = make_muon(model)
    change(monkeypatch)
    number, first = watch_steps(model, optimizer)[0]
    assert (first.id, first.evidence["part"], first.evidence["parameter"]) == ("optimizer_off", part, "1.weight")
    assert "Muon" in first.found and number == 1
