"""Optimizers whose state is more than a tensor for each parameter, and groups that are put together anew."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastckpt
from fastckpt import Checkpointer, StateMismatch

optim = torch.optim
State = dict[str, Any]


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


def save(url: str, state: State) -> None:
    with Checkpointer(url) as ckpt:
        ckpt.save(1, state)


def restore(url: str, state: State, **how: Any) -> None:
    with Checkpointer(url) as ckpt:
        assert ckpt.restore(state, **how) == 1


def refusal(url: str, state: State) -> str:
    with Checkpointer(url) as ckpt, pytest.raises(StateMismatch) as caught:
        ckpt.restore(state)
    return str(caught.value)


def refused(state: State) -> str:
    with Checkpointer(f"memory://{secrets.token_hex(8)}") as ckpt:
        with pytest.raises((TypeError, ValueError)) as caught:
            ckpt.save(1, state)
        assert ckpt.snapshots() == []
        ckpt.save(1, {}).wait()
    return str(caught.value)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> list[str]:
    losses = []
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            model.zero_grad()
            loss: torch.Tensor = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        losses.append(closure().item().hex())
        for optimizer in optimizers:
            optimizer.step(closure)
    return losses


def plain(item: Any) -> Any:
    """Everything there is, to the bit and in order, with the types it has."""
    if isinstance(item, torch.Tensor):
        return str(item.dtype), list(item.shape), item.detach().flatten().view(torch.uint8).tolist()
    if isinstance(item, dict):
        return type(item), [(key, plain(each)) for key, each in item.items()]
    if isinstance(item, list | tuple):
        return type(item), [plain(each) for each in item]
    return type(item), item


def shown(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    kept = [plain(dict(optimizer.state.get(parameter, {}))) for parameter in model.parameters()]
    others = [(key, plain(each)) for key, each in optimizer.state.items() if not isinstance(key, torch.Tensor)]
    return [*(plain(parameter) for parameter in model.parameters()), *kept, others]


class Shampoo(torch.optim.Optimizer):
    """For each parameter lists of factors, by names with dots and by numbers, beside what is no tensor."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["factors"] = {"left.right": [torch.eye(size) for size in parameter.shape], "none": None}
                    state["by dim"] = {dim: (torch.zeros(size), dim) for dim, size in enumerate(parameter.shape)}
                    state["a.b"] = torch.zeros_like(parameter)
                    state["count"] = 0
                    state["about"] = [{"shape": parameter.shape, "dtype": parameter.dtype}, 0.5, "text", [], True]
                state["count"] += 1
                grad = parameter.grad
                for dim, factor in enumerate(state["factors"]["left.right"]):
                    flat = grad.movedim(dim, 0).flatten(1) if grad.ndim > 1 else grad[:, None]
                    factor.add_(flat @ flat.T)
                    state["by dim"][dim][0].add_(flat.sum(1))
                    grad = torch.linalg.solve(
                        factor, grad.movedim(dim, 0).flatten(1) if grad.ndim > 1 else grad[:, None]
                    )
                    grad = grad.reshape(parameter.movedim(dim, 0).shape).movedim(0, dim)
                state["a.b"].mul_(0.9).add_(grad)
                parameter.sub_(group["lr"] * state["a.b"] / state["count"])


class EightBit(torch.optim.Optimizer):
    """State as bytes into a table of values, which is one tensor for all parameters, with a scale for each block."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.table = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state.update(step=0, state1=torch.full(parameter.shape, 128, dtype=torch.uint8), qmap1=self.table)
                state["absmax1"] = torch.ones(-(-parameter.numel() // 4))
            state["step"] += 1
            scale = state["absmax1"].repeat_interleave(4)[: parameter.numel()].view(parameter.shape)
            moment = state["qmap1"][state["state1"].long()] * scale * 0.9 + parameter.grad
            blocks = nn.functional.pad(moment.flatten(), (0, -moment.numel() % 4)).view(-1, 4)
            state["absmax1"].copy_(blocks.abs().amax(1).clamp(min=1e-9))
            scale = state["absmax1"].repeat_interleave(4)[: parameter.numel()].view(parameter.shape)
            state["state1"].copy_(torch.bucketize(moment / scale, state["qmap1"]).clamp(max=255))
            parameter.sub_(0.1 * state["qmap1"][state["state1"].long()] * scale)


class Together(torch.optim.Optimizer):
    """Keeps something for no one parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        both = self.state["global"]
        both["norms"] = [*both.get("norms", []), torch.tensor([2.0]), 3]
        self.state[("odd", 1)] = torch.ones(20_000) * len(both["norms"])
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(0.1 * len(both["norms"]) * parameter.grad)


NESTED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.5, max_iter=3, history_size=3),
    "LBFGS with line search": lambda p: optim.LBFGS(p, max_iter=2, line_search_fn="strong_wolfe"),
    "Shampoo": Shampoo,
    "8 bit": EightBit,
    "one for all": Together,
}


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("make", NESTED.values(), ids=NESTED.keys())
def test_nested_state_goes_back_and_training_on_is_equal_to_the_bit(
    url: str, make: Callable[[Any], torch.optim.Optimizer], warm: bool
) -> None:
    model = network(1)
    optimizer = make(model.parameters())
    train(model, [optimizer], range(3))
    save(url, {"model": model, "optimizer": optimizer})
    at_save = shown(model, optimizer)
    losses, at_end = train(model, [optimizer], range(3, 6)), shown(model, optimizer)

    again = network(2)
    other = make(again.parameters())
    if warm:
        train(again, [other], range(10, 15))
    restore(url, {"model": again, "optimizer": other})
    assert shown(again, other) == at_save
    assert train(again, [other], range(3, 6)) == losses
    assert shown(again, other) == at_end


@pytest.mark.parametrize("make", NESTED.values(), ids=NESTED.keys())
def test_a_warm_optimizer_goes_back_to_before_its_first_step(
    url: str, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    model = network(1)
    optimizer = make(model.parameters())
    save(url, {"model": model, "optimizer": optimizer})
    train(model, [optimizer], range(2))
    restore(url, {"model": model, "optimizer": optimizer})
    assert optimizer.state == {}


def test_tensors_inside_nested_state_have_keys_and_are_filled_in_place(url: str) -> None:
    model = network(1)
    optimizer = Shampoo(model.parameters())
    train(model, [optimizer], range(2))
    save(url, {"model": model, "optimizer": optimizer})
    keys = fastckpt.open(url).snapshot().keys()
    assert {key for key in keys if key.startswith("optimizer.state.0.bias")} == {
        *("optimizer.state.0.bias.a.b", "optimizer.state.0.bias.by dim.0.0"),
        "optimizer.state.0.bias.factors.left.right.0",
    }
    factor = optimizer.state[model[0].bias]["factors"]["left.right"][0]
    expected = factor.tolist()
    train(model, [optimizer], range(2, 3))
    restore(url, {"model": model, "optimizer": optimizer})
    assert optimizer.state[model[0].bias]["factors"]["left.right"][0] is factor
    assert factor.tolist() == expected


def test_keys_that_nested_names_would_share_are_kept_apart(url: str) -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    nested = {"a": {"b.c": torch.ones(1), "b": {"c": torch.ones(2)}, 1: torch.ones(3), "1": torch.ones(4)}}
    optimizer.state[model.weight].update(nested)
    save(url, {"model": model, "optimizer": optimizer})
    fresh = optim.SGD(model.parameters(), lr=0.1)
    restore(url, {"model": model, "optimizer": fresh})
    assert plain(fresh.state[model.weight]) == plain(nested)


def test_a_table_that_all_parameters_share_stays_one_where_it_is_one(url: str) -> None:
    model = network(1)
    optimizer = EightBit(model.parameters())
    train(model, [optimizer], range(2))
    save(url, {"model": model, "optimizer": optimizer})
    layout = fastckpt.open(url).snapshot().layout
    assert sum(layout.keys[number].endswith(".qmap1") for number, _ in layout.aliases) == 2, "stored once"
    table = optimizer.table.clone()
    optimizer.table.zero_()
    restore(url, {"model": model, "optimizer": optimizer})
    assert all(state["qmap1"] is optimizer.table for state in optimizer.state.values())
    assert torch.equal(optimizer.table, table)


def test_one_tensor_of_the_state_is_not_filled_with_two_of_the_snapshot(url: str) -> None:
    model = network(1)
    optimizer = EightBit(model.parameters())
    train(model, [optimizer], range(1))
    for state in optimizer.state.values():
        state["qmap1"] = state["qmap1"] * torch.rand(())
    save(url, {"model": model, "optimizer": optimizer})
    expected = [plain(state["qmap1"]) for state in optimizer.state.values()]
    for state in optimizer.state.values():
        state["qmap1"] = optimizer.table
    restore(url, {"model": model, "optimizer": optimizer})
    assert [plain(state["qmap1"]) for state in optimizer.state.values()] == expected


def test_entries_keep_the_order_they_had(url: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight].update(z=torch.ones(2), m=1, a=torch.ones(1), k=None)
    optimizer.state[model.bias].update(k=None, a=torch.ones(1), z=torch.ones(2), m=1)
    save(url, {"model": model, "optimizer": optimizer})
    fresh = optim.SGD(model.parameters(), lr=0.1)
    restore(url, {"model": model, "optimizer": fresh})
    assert [list(fresh.state[parameter]) for parameter in (model.weight, model.bias)] == [[*"zmak"], [*"kazm"]]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_muon_and_adamw_side_by_side_over_one_module(url: str) -> None:
    def job(seed: int) -> State:
        model = network(seed)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        return {"model": model, "muon": optim.Muon(matrices, lr=0.1), "adamw": optim.AdamW([model[0].bias], lr=0.1)}

    state = job(1)
    train(state["model"], [state["muon"], state["adamw"]], range(3))
    save(url, state)
    again = job(2)
    restore(url, again)
    for name in ("muon", "adamw"):
        assert shown(again["model"], again[name]) == shown(state["model"], state[name])
    expected = train(state["model"], [state["muon"], state["adamw"]], range(3, 5))
    assert train(again["model"], [again["muon"], again["adamw"]], range(3, 5)) == expected


# --- state that would be lost ---------------------------------------------------------------------------------------


def test_state_of_a_parameter_in_no_group_is_refused() -> None:
    model = network(1)
    optimizer = optim.AdamW(model.parameters())
    train(model, [optimizer], range(1))
    optimizer.param_groups[0]["params"].pop()
    text = refused({"model": model, "optimizer": optimizer})
    assert text.startswith("optimizer: keeps ['exp_avg', 'exp_avg_sq', 'step'] for a parameter of shape [3, 6] that is")


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer and shows nothing of its state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.inside = {"base": optim.AdamW(self.param_groups[0]["params"])}

    def step(self, closure: Any = None) -> None:
        self.inside["base"].step(closure)


class Delegating(torch.optim.Optimizer):
    """Wraps an optimizer and passes everything on to it."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer = inner

    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]
    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    defaults = property(lambda self: self.optimizer.defaults)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


def test_an_optimizer_that_hides_another_is_refused_and_one_that_passes_on_is_not(url: str) -> None:
    model = network(1)
    hiding = Lookahead(model.parameters())
    text = refused({"model": model, "optimizer": hiding})
    assert text.startswith("optimizer: a Lookahead that wraps another optimizer (inside, a AdamW)")
    inner = optim.AdamW(model.parameters())
    train(model, [inner], range(2))
    save(url, {"model": model, "optimizer": inner})
    with Checkpointer(url) as ckpt, pytest.raises(ValueError, match="optimizer: a Lookahead that wraps another"):
        ckpt.restore({"model": model, "optimizer": hiding})

    again = network(2)
    passing = Delegating(optim.AdamW(again.parameters()))
    restore(url, {"model": again, "optimizer": passing})
    assert shown(again, passing.optimizer) == shown(model, inner)
    save(f"{url}2", {"model": again, "optimizer": passing})
    assert fastckpt.open(f"{url}2").snapshot().keys() == fastckpt.open(url).snapshot().keys()


def test_an_object_that_no_snapshot_can_hold_is_refused_by_its_place() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["odd"] = [{"deep": object()}]
    text = refused({"model": model, "optimizer": optimizer})
    assert text.startswith("optimizer['state']['weight']['odd'][0]['deep']: ")
    loop: list[Any] = []
    loop.append(loop)
    optimizer.state[model.weight]["odd"] = loop
    assert "more than 32 containers inside each other" in refused({"model": model, "optimizer": optimizer})


# --- groups ---------------------------------------------------------------------------------------------------------


def test_parameters_find_their_options_and_state_by_name_however_they_are_grouped(url: str) -> None:
    model = network(1)
    first, bias, last = model.parameters()
    groups = [{"params": [first, last], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = optim.AdamW(groups, lr=0.2, betas=(0.5, 0.6))
    train(model, [optimizer], range(2))
    save(url, {"model": model, "optimizer": optimizer})

    again = network(2)
    first, bias, last = again.parameters()
    other = optim.AdamW([{"params": [bias]}, {"params": [last]}, {"params": [first]}])
    restore(url, {"model": again, "optimizer": other})
    assert [group["weight_decay"] for group in other.param_groups] == [0.0, 0.3, 0.3]
    assert {(group["lr"], group["betas"]) for group in other.param_groups} == {(0.2, (0.5, 0.6))}
    assert shown(again, other) == shown(model, optimizer)

    together = optim.AdamW(again.parameters(), lr=7.0)
    text = refusal(url, {"model": again, "optimizer": together})
    assert (
        "optimizer: 0.weight and 0.bias are in one group, but were saved with different options: weight_decay" in text
    )
    assert text.endswith("is 0.3 and 0.0; put them into groups of their own")
    assert (together.param_groups[0]["lr"], together.state) == (7.0, {})


def test_groups_in_another_order_are_refused_with_a_scheduler_which_knows_them_by_number(url: str) -> None:
    def trained(reverse: bool, together: bool = False) -> State:
        model = network(1)
        groups = [{"params": [model[0].weight], "lr": 1e-2}, {"params": [model[0].bias, model[2].weight], "lr": 1e-4}]
        optimizer = optim.AdamW(model.parameters() if together else groups[:: -1 if reverse else 1])
        schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"model": model, "optimizer": optimizer, "schedule": schedule}

    save(url, trained(reverse=False))
    restore(url, trained(reverse=False))
    text = refusal(url, trained(reverse=True))
    assert "schedule, a scheduler of it, knows its groups by number" in text
    state = trained(reverse=True)
    del state["schedule"]
    restore(url, state)
    assert [group["lr"] for group in state["optimizer"].param_groups] == [1e-4, 1e-2]


def test_names_given_to_an_optimizer_are_the_states_own(url: str) -> None:
    model, again = network(1), network(2)
    optimizer = optim.AdamW(model.named_parameters())
    train(model, [optimizer], range(2))
    save(url, {"model": model, "optimizer": optimizer})
    groups = [{"params": [*again[0].named_parameters("0")]}, {"params": [*again[2].named_parameters("2")]}]
    other = optim.AdamW(groups)
    restore(url, {"model": again, "optimizer": other})
    assert [group["param_names"] for group in other.param_groups] == [["0.weight", "0.bias"], ["2.weight"]]
    assert shown(again, other) == shown(model, optimizer)
    restore(url, {"model": again, "optimizer": optim.AdamW(again.parameters())})


def test_tensors_of_the_state_are_known_to_an_optimizer_by_their_names(url: str) -> None:
    def trained(order: int) -> State:
        state: State = {name: torch.zeros(2, requires_grad=True) for name in ("v", "w")}
        state["optimizer"] = optim.SGD([state["v"], state["w"]][::order], lr=0.1, momentum=0.9)
        for number, name in enumerate(("v", "w")):
            state[name].grad = torch.full((2,), number + 1.0)
        return state

    saved = trained(1)
    saved["optimizer"].step()
    save(url, saved)
    again = trained(-1)
    restore(url, again)
    for name in ("v", "w"):
        kept, restored = (state["optimizer"].state[state[name]]["momentum_buffer"] for state in (saved, again))
        assert torch.equal(kept, restored), name


def test_a_parameter_that_was_not_saved_is_left_alone_if_that_is_asked_for(url: str) -> None:
    model = network(1)
    optimizer = optim.AdamW([*model[0].parameters()], lr=0.2)
    train(model, [optimizer], range(2))
    save(url, {"model": model, "optimizer": optimizer})
    again = network(2)
    other = optim.AdamW(again.parameters(), lr=0.5)
    train(again, [other], range(1))
    kept = plain(other.state[again[2].weight])
    assert "optimizer: no rank saved parameters of group 0: ['2.weight']" in refusal(
        url, {"model": again, "optimizer": other}
    )
    restore(url, {"model": again, "optimizer": other}, missing="keep")
    assert plain(other.state[again[2].weight]) == kept
    assert plain(other.state[again[0].weight]) == plain(optimizer.state[model[0].weight])
    assert other.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("make", [NESTED["LBFGS"], Together])
def test_state_for_all_parameters_in_their_order_is_not_taken_over_in_another_order(
    url: str, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    model = network(1)
    optimizer = make(model.parameters())
    train(model, [optimizer], range(2))
    save(url, {"model": model, "optimizer": optimizer})
    other = make([*model.parameters()][::-1])
    text = refusal(url, {"model": model, "optimizer": other})
    assert "optimizer: the parameters of group 0 differ; in another order" in text


def test_a_tensor_among_the_options_comes_back_whatever_its_size_and_a_number_stays_a_number(url: str) -> None:
    model = network(1)
    large = torch.randn(20_000)
    optimizer = optim.SGD(model.parameters(), lr=torch.tensor(0.25), foreach=False)
    optimizer.param_groups[0]["large"] = [large]
    save(url, {"model": model, "optimizer": optimizer})
    other = optim.SGD(model.parameters(), lr=0.5)
    restore(url, {"model": model, "optimizer": other})
    (group,) = other.param_groups
    assert torch.equal(group["large"][0], large)
    assert group["lr"] == 0.25
    assert type(group["lr"]) is float


def test_another_value_under_the_name_of_an_optimizer_is_a_mismatch(url: str) -> None:
    model = network(1)
    save(url, {"model": model, "optimizer": {"param_groups": [{"lr": 0.1}], "state": {}}})
    text = refusal(url, {"model": model, "optimizer": optim.SGD(model.parameters(), lr=0.1)})
    assert text.splitlines()[1:] == ["  optimizer: an optimizer in the state, but another value in the snapshot"]
