"""Tensors of classes of their own: taken apart and filled bit for bit, or refused by name; and what a snapshot says of
them is only compared."""

from __future__ import annotations

import dataclasses
import enum
import secrets
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import fastckpt
from fastckpt import Checkpointer, Shard, Snapshot, StateMismatch
from fastckpt.cli.main import commands


class Packing(enum.Enum):
    ROWS = 1
    COLUMNS = 2


@dataclasses.dataclass(frozen=True)
class Layout:
    packing: Packing
    block: tuple[int, ...] = (1, 2)


class Precision(NamedTuple):
    seen: torch.dtype
    exact: bool


class Packed(torch.Tensor):
    """Made of whatever tensors it is given, and a context. ``names`` may leave some out, as optional ones are."""

    parts: dict[str, torch.Tensor]
    context: object

    @staticmethod
    def __new__(cls, parts: dict[str, torch.Tensor], context: object, shape: tuple[int, ...]) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, parts: dict[str, torch.Tensor], context: object, shape: tuple[int, ...]) -> None:
        self.__dict__.update(parts)
        self.names, self.context = list(parts), context

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return self.names, self.context

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Packed:
        return cls(inner, context, size)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls({name: getattr(args[0], name) for name in args[0].names}, args[0].context, args[0].shape)
        raise NotImplementedError(func)


class Tagged(torch.Tensor):
    """Only adds a method."""

    def tag(self) -> str:
        return "tagged"


class Dispatching(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def two(seed: int, *shape: int) -> TwoTensor:
    made = torch.Generator().manual_seed(seed)
    return TwoTensor(torch.randn(shape, generator=made), torch.randn(shape, generator=made))


CONTEXT = {"layout": Layout(Packing.ROWS), "precision": Precision(torch.bfloat16, True), "device": torch.device("cpu")}


def packed(seed: int, context: object = CONTEXT, **more: torch.Tensor) -> Packed:
    """Codes of another shape than the whole, scales, and a part that itself is made of two."""
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (6,), dtype=torch.uint8, generator=made)
    return Packed(
        {"codes": codes, "scale": torch.rand(2, generator=made), "inner": two(seed, 3), **more}, context, (4, 3)
    )


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


def save(url: str, state: dict[str, Any]) -> Snapshot:
    with Checkpointer(url) as ckpt:
        ckpt.save(1, state)
    return fastckpt.open(url).snapshot()


def restore(url: str, state: dict[str, Any], **how: Any) -> None:
    with Checkpointer(url) as ckpt:
        assert ckpt.restore(state, **how) == 1


def refusal(url: str, state: dict[str, Any], **how: Any) -> str:
    before = {name: bits(tensor) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    with Checkpointer(url) as ckpt, pytest.raises(StateMismatch) as caught:
        ckpt.restore(state, **how)
    assert before == {name: bits(state[name]) for name in before}
    return str(caught.value)


def refused(tensor: torch.Tensor) -> str:
    with Checkpointer(f"memory://{secrets.token_hex(8)}") as ckpt, pytest.raises(TypeError) as caught:
        ckpt.save(1, {"t": tensor})
    return str(caught.value)


def bits(tensor: torch.Tensor) -> object:
    """All bytes of a tensor, by the paths of the plain ones in it."""
    if hasattr(tensor, "__tensor_flatten__"):
        return {name: bits(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]}
    return tensor.detach().as_subclass(torch.Tensor).contiguous().flatten().view(torch.uint8).tolist()


def test_a_tensor_made_of_others_comes_back_bit_for_bit_in_place_wherever_it_is(url: str) -> None:
    def state(seed: int) -> dict[str, Any]:
        module = nn.Linear(3, 4)
        module.weight = nn.Parameter(two(seed, 4, 3))
        module.register_buffer("table", two(seed + 1, 2))
        module.register_buffer("codes", packed(seed))
        return {"model": module, "alone": TwoTensor(two(seed + 2, 3), two(seed + 3, 3))}

    saved, new = state(0), state(10)
    save(url, saved)
    weight, inner = new["model"].weight, new["model"].weight.a
    restore(url, new)
    assert new["model"].weight is weight
    assert new["model"].weight.a is inner
    assert isinstance(weight, nn.Parameter)
    for name in ("weight", "table", "codes"):
        assert bits(getattr(new["model"], name)) == bits(getattr(saved["model"], name))
    assert bits(new["alone"]) == bits(saved["alone"])


def test_what_it_is_made_of_has_keys_of_its_own_which_show_lists(url: str) -> None:
    tensor = packed(1)
    snapshot = save(url, {"t": tensor})
    assert snapshot.keys() == ["t.codes", "t.inner.a", "t.inner.b", "t.scale"]
    assert snapshot.read("t.inner.b").tolist() == tensor.inner.b.tolist()  # type: ignore[attr-defined]


def test_show_lists_the_inner_keys_and_the_class(tmp_path: Any) -> None:
    save(str(tmp_path), {"t": two(1, 3)})
    shown = CliRunner().invoke(commands, ["show", str(tmp_path), "--values"])
    assert shown.exit_code == 0, shown.output
    assert "t.a" in shown.output
    assert "t.b" in shown.output
    assert "TwoTensor" in shown.output


def test_parameters_tied_by_what_they_are_made_of_are_stored_and_filled_once(url: str) -> None:
    def model(seed: int) -> nn.Module:
        module = nn.Module()
        module.one = nn.Parameter(two(seed, 50))
        module.other = module.one
        module.third = nn.Parameter(TwoTensor(module.one.a.detach(), module.one.b.detach()))
        return module

    saved, new = model(1), model(2)
    assert save(url, {"m": saved}).layout.bytes() == 2 * 50 * 4
    restore(url, {"m": new})
    assert bits(new.third) == bits(saved.one)
    apart = nn.Module()
    apart.one, apart.other, apart.third = (nn.Parameter(two(seed, 50)) for seed in (3, 4, 5))
    restore(url, {"m": apart})
    assert bits(apart.one) == bits(apart.third) == bits(saved.one)


def test_it_is_copied_before_save_returns_unless_only_a_step_changes_it(url: str) -> None:
    tensor, module = two(1, 3), nn.Module()
    module.register_buffer("table", two(2, 3))
    before = bits(tensor), bits(module.table)
    with Checkpointer(url) as ckpt:
        ckpt.save(1, {"t": tensor, "m": module})
        tensor.a.zero_()
        module.table.b.zero_()
    restore(url, {"t": tensor, "m": module})
    assert (bits(tensor), bits(module.table)) == before


class Other(Packed):
    pass


def inner_of(tensor: Packed) -> dict[str, torch.Tensor]:
    return {name: getattr(tensor, name) for name in tensor.names}


def wide() -> Packed:
    return Packed(
        {"codes": torch.zeros(6, dtype=torch.uint8), "scale": torch.zeros(2), "inner": two(1, 3)}, CONTEXT, (3, 4)
    )


UNLIKE: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "a plain tensor": (lambda: torch.zeros(4, 3), "Packed in the snapshot, a plain float32 tensor in the state"),
    "another class": (lambda: two(2, 4, 3), "Packed in the snapshot, of class torch.testing._internal.two_tensor.Two"),
    "a class like it": (lambda: Other(inner_of(packed(2)), CONTEXT, (4, 3)), "Packed in the snapshot"),
    "an enum member": (lambda: packed(2, {**CONTEXT, "layout": Layout(Packing.COLUMNS)}), "its context is"),
    "a field": (lambda: packed(2, {**CONTEXT, "layout": Layout(Packing.ROWS, (1, 3))}), "its context is"),
    "a bool, not an int": (lambda: packed(2, {**CONTEXT, "precision": Precision(torch.bfloat16, 1)}), "its context is"),  # type: ignore[arg-type]
    "a dtype": (lambda: packed(2, {**CONTEXT, "precision": Precision(torch.float16, True)}), "its context is"),
    "no named tuple": (lambda: packed(2, {**CONTEXT, "precision": (torch.bfloat16, True)}), "its context is"),
    "one part more": (lambda: packed(2, more=torch.ones(1)), "it is made of ['codes', 'scale', 'inner'] in the"),
    "another shape": (wide, "its shape is [4, 3] in the snapshot, [3, 4] in the state"),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_it_is_filled_only_if_class_context_and_form_are_alike(url: str, kind: str) -> None:
    make, reason = UNLIKE[kind]
    target = make()
    save(url, {"t": packed(1)})
    text = refusal(url, {"t": target})
    assert "\n  t: of class " in text
    assert reason in text
    assert text.count("\n") == 1  # the parts are not named as well
    restore(url, {"t": packed(3)})


def test_a_plain_tensor_is_not_taken_for_one_that_is_made_of_others(url: str) -> None:
    save(url, {"t": torch.ones(3), "t.a": torch.ones(3)})
    assert "t: a plain tensor in the snapshot, of class" in refusal(url, {"t": two(1, 3)})
    assert "t: in the state but not in the snapshot" in refusal(
        url, {"u": torch.ones(1), "t": two(1, 3)}, rename={"t": "u"}
    )
    with Checkpointer(url) as ckpt, pytest.raises(ValueError, match=r"t\.a: two things in the state have this key"):
        ckpt.save(2, {"t": two(1, 3), "t.a": torch.ones(3)})


def test_cast_rename_only_and_keep_go_on_to_the_parts(url: str) -> None:
    tensor = two(1, 3)
    save(url, {"t": tensor})
    low = TwoTensor(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16))
    assert "its dtype is 'float32' in the snapshot, 'bfloat16' in the state" in refusal(url, {"t": low})
    restore(url, {"t": low}, cast=True)
    assert torch.equal(low.a, tensor.a.bfloat16())
    renamed, kept = two(2, 3), two(3, 3)
    before = bits(kept)
    restore(url, {"new": renamed, "kept": kept}, rename={"t": "new"}, missing="keep")
    assert bits(renamed) == bits(tensor)
    assert bits(kept) == before
    restore(url, {"t": renamed, "kept": kept}, only=("t",))
    assert bits(kept) == before


RECORD = {
    "tensor_class": "torch.testing._internal.two_tensor.TwoTensor",
    "context": None,
    "parts": ["a", "b"],
    "shape": [3],
    "dtype": "float32",
    "stride": [1],
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tensor_class": "os.system"}, "of class os.system in the snapshot, of class torch.testing._internal.two_te"),
        (
            {"tensor_class": f"{Packed.__module__}.Packed"},
            f"of class {Packed.__module__}.Packed in the snapshot, of class",
        ),
        ({"context": ["x"] * 9}, "its context is ['x', 'x'"),
        ({"context": {"class": "os.system", "fields": {"command": "true"}}}, "its context is {'class': 'os.system'"),
        ({"parts": ["a"]}, "it is made of ['a'] in the snapshot, ['a', 'b'] in the state"),
        ({"parts": 7}, "it is made of 7 in the snapshot"),
        ({"shape": [2**62] * 4}, "its shape is [46116"),
        ({"dtype": None}, "its dtype is None in the snapshot"),
        ({"stride": {}}, "its stride is {} in the snapshot"),
        (
            {"boxes": "here"},
            "parts of it are each rank's own, and belong to the boxes 'here' in the snapshot, but None in the",
        ),
        ({"more": 1}, "a record of a newer kind"),
        ({"tensor_class": 7}, "no tensor in the snapshot, of class"),
    ],
)
def test_a_record_that_somebody_made_up_is_only_compared(url: str, change: dict[str, Any], reason: str) -> None:
    parts = {"t.a": torch.ones(3), "t.b": torch.zeros(3)}
    save(url, {"t": RECORD | change, **parts})
    text = refusal(url, {"t": two(2, 3)})
    assert f"t: {reason}" in text.replace("of class torch.testing._internal.two_tensor.TwoTensor: ", "")
    genuine = two(2, 3)
    save(url, {"t": RECORD, **parts})
    restore(url, {"t": genuine})
    assert genuine.a.tolist() == [1, 1, 1]


CANNOT: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "no flatten": (lambda: torch.ones(3).as_subclass(Dispatching), "Dispatching; save the plain tensors it is made of"),
    "a function in the context": (
        lambda: packed(1, {"f": torch.relu}),
        "its context['f'] is of class builtins.builtin",
    ),
    "an object in the context": (lambda: packed(1, [object()]), "its context[0] is of class builtins.object, which"),
    "a set of enums": (
        lambda: packed(1, {Packing.ROWS}),
        "its context is of class builtins.set, which cannot be recor",
    ),
    "no tensor": (lambda: Packed({"mesh": 3}, None, (1,)), "by its __tensor_flatten__, mesh is no tensor"),  # type: ignore[dict-item]
    "nothing": (lambda: Packed({}, None, (1,)), "by its __tensor_flatten__, it names no tensors"),
    "a part that is refused": (
        lambda: packed(1, more=torch.eye(2).to_sparse()),
        "t.more: cannot save a tensor of layout",
    ),
    "a part on meta": (
        lambda: packed(1, more=torch.ones(2, device="meta")),
        "t.more: cannot save a tensor on the meta",
    ),
    "not initialized": (lambda: nn.UninitializedParameter(), "it has no elements yet, run a forward first"),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_be_taken_apart_exactly_is_refused_by_name(kind: str) -> None:
    make, reason = CANNOT[kind]
    text = refused(make())
    assert text.startswith(("t: cannot save a tensor ", "t.more: cannot save a tensor "))
    assert reason in text


def test_a_context_that_holds_itself_or_whose_flatten_fails_is_refused_by_name() -> None:
    endless: list[object] = []
    endless.append(endless)
    assert refused(packed(1, endless)).startswith("t: cannot save a tensor of class ")
    broken = packed(1)
    broken.names = ["gone"]
    assert "its __tensor_flatten__ fails (AttributeError" in refused(broken)


def test_a_class_that_only_adds_methods_is_saved_as_the_plain_tensor_it_is(url: str) -> None:
    tagged = torch.randn(3).as_subclass(Tagged)
    module = nn.Module()
    module.weight, module.table = nn.Parameter(tagged.clone()), nn.Buffer(tagged.clone())
    assert save(url, {"t": tagged, "m": module}).read("t").tolist() == tagged.tolist()
    targets = torch.zeros(3).as_subclass(Tagged), torch.zeros(3)
    for target in targets:
        restore(url, {"t": target, "m": module})
        assert bits(target) == bits(tagged)
    assert targets[0].tag() == "tagged"


def test_a_class_that_keeps_attributes_is_not_taken_for_plain() -> None:
    scaled = torch.ones(3).as_subclass(Tagged)
    scaled.scale = 2.0  # type: ignore[attr-defined]
    assert "Tagged, which keeps scale beside its elements; save the plain tensors" in refused(scaled)

    class Slotted(torch.Tensor):
        __slots__ = ("scale",)

    assert "which keeps scale beside its elements" in refused(torch.ones(3).as_subclass(Slotted))


def test_a_box_of_a_tensor_made_of_others_is_a_box_of_those_of_its_shape(url: str) -> None:
    whole = two(1, 4, 3)
    module = nn.Module()
    module.weight = nn.Parameter(whole)
    state = {"m": module, "t": Shard(module.weight, (0, 0), (4, 3))}
    snapshot = save(url, state)
    assert snapshot.read("t.b").tolist() == whole.b.tolist()
    assert snapshot.layout.bytes() == 2 * 12 * 4
    target = two(2, 2, 3)
    restore(url, {"t": Shard(target, (2, 0), (4, 3))})
    assert target.a.tolist() == whole.a[2:].tolist()
    assert target.b.tolist() == whole.b[2:].tolist()


def quantized(config: Any, seed: int) -> nn.Module:
    from torchao.quantization import quantize_

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    quantize_(model, config)
    return model


@pytest.fixture
def torchao() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_quantized_weights_of_torchao_come_back_bit_for_bit(url: str, torchao: Any, config: str) -> None:
    saved, new = (quantized(getattr(torchao, config)(), seed) for seed in (1, 2))
    keys = save(url, {"m": saved}).keys()
    assert "m.0.weight.qdata" in keys
    assert "m.0.weight" not in keys
    restore(url, {"m": new})
    assert [bits(each) for each in new.parameters()] == [bits(each) for each in saved.parameters()]
    x = torch.randn(3, 64)
    assert torch.equal(new(x), saved(x))
    rows = getattr(torchao, config)(granularity=torchao.PerTensor() if config[0] == "F" else torchao.PerGroup(16))
    assert "m.0.weight: of class torchao.quantization." in refusal(url, {"m": quantized(rows, 3)})
    plain = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    assert "m.0.weight: of class torchao.quantization." in refusal(url, {"m": plain})


def stepped(make: Callable[[Any], torch.optim.Optimizer], seed: int, steps: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(64, 64)
    optimizer = make(model.parameters())
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Any]:
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(3, 64, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
    return [bits(each) for each in model.parameters()]


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
@pytest.mark.parametrize("steps", [0, 1], ids=["fresh", "warm"])
def test_low_bit_optimizers_of_torchao_train_on_bit_for_bit(url: str, torchao: Any, kind: str, steps: int) -> None:
    import torchao.optim

    with torch.compiler.set_stance("force_eager"):
        model, optimizer = stepped(getattr(torchao.optim, kind), 1, 2)
        assert "o.state.weight.exp_avg.codes" in save(url, {"m": model, "o": optimizer}).keys()  # noqa: SIM118
        new_model, new_optimizer = stepped(getattr(torchao.optim, kind), 2, steps)
        old = new_optimizer.state[new_model.weight].get("exp_avg") if steps else None
        restore(url, {"m": new_model, "o": new_optimizer})
        made = new_optimizer.state[new_model.weight]["exp_avg"]
        assert type(made).__name__.startswith("OptimState")
        assert old is None or made is old
        assert bits(made) == bits(optimizer.state[model.weight]["exp_avg"])
        assert train(new_model, new_optimizer, range(2, 4)) == train(model, optimizer, range(2, 4))


def test_state_of_a_parameter_made_of_others_is_made_like_it_for_a_fresh_optimizer(url: str) -> None:
    def model(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.Module()
        module.weight = nn.Parameter(two(seed, 3))
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, foreach=False)

    saved, optimizer = model(1)
    saved.weight.grad = two(2, 3)
    optimizer.step()
    save(url, {"m": saved, "o": optimizer})
    new, fresh = model(3)
    restore(url, {"m": new, "o": fresh})
    state = fresh.state[new.weight]
    assert bits(state["exp_avg"]) == bits(optimizer.state[saved.weight]["exp_avg"])
    assert type(state["exp_avg"]) is TwoTensor


def adam_of_two() -> torch.optim.Optimizer:
    """An optimizer whose state is of a class that its parameter is not."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3))], lr=0.1)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"] = two(1, 3)
    return optimizer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"tensor_class": "subprocess.Popen"},
            "of class subprocess.Popen in the snapshot, but no such class is loaded",
        ),
        ({"tensor_class": "torch.Tensor"}, "no such class is loaded"),
        ({"tensor_class": "torch.distributed.tensor.DTensor"}, "no such class is loaded"),
        (
            {"context": {"class": "subprocess.Popen", "fields": {"args": "true"}}},
            "'subprocess.Popen' in the snapshot, which is not made from there; take one",
        ),
        ({"context": [1]}, "which cannot be made (AssertionError: Expected meta to be None)"),
        ({"parts": ["a", "a"]}, "names a part twice"),
        ({"parts": ["a"]}, "which cannot be made (KeyError: 'b')"),
        ({"tensor_class": "\x1b[31m\n"}, r"of class \x1b[31m\n in the snapshot, but no such class is loaded"),
        ({"parts": None}, "which cannot be made (TypeError"),
        ({"parts": ["a", "gone"]}, "o.state.0.0.exp_avg.gone: not among what this rank can restore"),
        ({"shape": "x"}, "which cannot be made"),
        ({"dtype": "float16"}, "its dtype is 'float16' in the snapshot, 'float32' in the state"),
    ],
)
def test_nothing_is_made_of_a_record_but_a_loaded_class_out_of_plain_values(
    url: str, change: dict[str, Any], reason: str
) -> None:
    own = f"memory://{secrets.token_hex(8)}"
    tree = save(own, {"o": adam_of_two()}).value("o", 0)
    entry = "o.state.0.0.exp_avg"
    parts = {f"{entry}.a": torch.ones(3), f"{entry}.b": torch.zeros(3)}
    fresh = torch.optim.AdamW([nn.Parameter(torch.zeros(3))], lr=0.1)
    save(url, {"o": tree, entry: RECORD | change, **parts})
    assert reason in refusal(url, {"o": fresh})
    assert not fresh.state
    save(url, {"o": tree, entry: RECORD, **parts})
    restore(url, {"o": fresh})
    (state,) = fresh.state.values()
    assert bits(state["exp_avg"]) == bits(TwoTensor(torch.ones(3), torch.zeros(3)))
