"""FSDP1: every strategy restores what any layout saved, at any number of ranks, and goes on as if never stopped.

What lies where is judged by torch's own means: ``summon_full_params``, and sharded optimizer state dicts. (Full ones,
gathered on the CPU, return the memory of one tensor for another.)
"""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastckpt_fsdp
import jobs
import pytest
import ranks
import torch
import torch.distributed as dist
from jobs import Net, prints, same, train
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.two_tensor import TwoTensor

from fastckpt import Checkpointer, Options
from fastckpt.job.state import Describer

pytestmark = pytest.mark.distributed

Prints = dict[str, str]
SMALL = Options(chunk_bytes=4096, commit_seconds_max=30)
CPU = torch.device("cpu")
STRATEGIES = {
    "full": (ShardingStrategy.FULL_SHARD, True),
    "full flat": (ShardingStrategy.FULL_SHARD, False),
    "gradients": (ShardingStrategy.SHARD_GRAD_OP, True),
    "gradients flat": (ShardingStrategy.SHARD_GRAD_OP, False),
    "copies": (ShardingStrategy.NO_SHARD, True),
    "copies flat": (ShardingStrategy.NO_SHARD, False),
    "hybrid": (ShardingStrategy.HYBRID_SHARD, True),
    "hybrid flat": (ShardingStrategy._HYBRID_SHARD_ZERO2, False),
}
OTHERS = ["ddp", "fsdp", "plain"]


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A ``Net`` in units within units; its last layer has a dtype of its own, and a parameter that is frozen."""
    if kind in OTHERS:
        return jobs.build(kind, seed)
    torch.manual_seed(seed)
    net = Net()
    strategy, original = STRATEGIES[kind]
    world = dist.get_world_size()
    hybrid = kind.startswith("hybrid")
    mesh = init_device_mesh("cpu", (2, world // 2) if hybrid else (world,))
    # A flat parameter of trainable and frozen parameters there is only with the original ones.
    options: dict[str, Any] = {} if original else {"ignored_states": [net.frozen]}
    model = wrapped(net, [*net.blocks, net.low], mesh, sharding_strategy=strategy, use_orig_params=original, **options)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01)


def wrapped(net: nn.Module, units: list[nn.Module], mesh: DeviceMesh | None, **options: Any) -> nn.Module:
    with warnings.catch_warnings():  # of strategies that are outdated, or that one rank makes the same
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            net,
            device_id=CPU,
            device_mesh=mesh,
            auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or module in units,
            **options,
        )


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of the state by name, gathered from all ranks."""
    if not isinstance(model, FullyShardedDataParallel):
        return jobs.whole(model, optimizer)
    found: dict[str, torch.Tensor] = {}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            found[name.replace("_fsdp_wrapped_module.", "")] = tensor.detach().clone()
    found.pop("scratch", None)
    sharded = ShardedStateDictConfig(), ShardedOptimStateDictConfig()
    with warnings.catch_warnings():  # outdated too
        warnings.simplefilter("ignore")
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, *sharded):
            states: Mapping[str, Mapping[str, Any]] = FullyShardedDataParallel.optim_state_dict(model, optimizer)[
                "state"
            ]
    for name, state in states.items():
        for entry, tensor in state.items():
            found[f"{name}/{entry}"] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
    return dict(sorted(found.items()))


def saves(kinds: list[str], folder: str) -> dict[str, Prints]:
    """Trains and saves, one repository a kind; then trains on, from memory and from the snapshot."""
    found = {}
    for kind in kinds:
        model, optimizer = build(kind, seed=1)
        with Checkpointer(f"{folder}/{kind}-{dist.get_world_size()}", options=SMALL) as ckpt:
            train(model, optimizer, range(2))
            ckpt.save(2, {"model": model, "optimizer": optimizer}).wait()
            found[kind] = prints(whole(model, optimizer))
            train(model, optimizer, [2])
            expected = prints(whole(model, optimizer))
            model, optimizer = build(kind, seed=2)
            assert ckpt.restore({"model": model, "optimizer": optimizer}) == 2
        train(model, optimizer, [2])
        assert prints(whole(model, optimizer)) == expected, kind
    return found


def restores(kinds: dict[str, list[str]], folder: str, saved: dict[str, Prints]) -> None:
    for source, targets in kinds.items():
        for kind in targets:
            model, optimizer = build(kind, seed=3)
            with Checkpointer(f"{folder}/{source}", options=SMALL) as ckpt:
                assert ckpt.restore({"model": model, "optimizer": optimizer}) == 2
            assert prints(whole(model, optimizer)) == saved[source], (source, kind)
            if isinstance(model, FullyShardedDataParallel):  # which gives no gradient to what has no elements here
                assert not any(optimizer.state.get(each) for each in model.parameters() if not each.numel())


def test_every_strategy_resumes_exactly_and_restores_what_any_other_layout_saved(tmp_path: Path) -> None:
    folder = str(tmp_path)
    saved = {f"{kind}-1": found for kind, found in same(ranks.run(1, saves, ["plain"], folder)).items()}
    saved |= {f"{kind}-2": found for kind, found in same(ranks.run(2, saves, ["ddp", "full flat"], folder)).items()}
    saved |= {f"{kind}-4": found for kind, found in same(ranks.run(4, saves, list(STRATEGIES), folder)).items()}
    at_4 = {"plain-1": ["full", "hybrid flat"], "ddp-2": ["gradients flat"], "full flat-2": ["copies", "full"]}
    ranks.run(4, restores, at_4, folder, saved)
    at_2 = {"full-4": ["fsdp", "full flat"], "hybrid-4": ["ddp"], "copies flat-4": ["full"]}
    ranks.run(2, restores, at_2, folder, saved)
    ranks.run(1, restores, {"full-4": ["plain"], "full flat-4": ["plain"], "ddp-2": ["full flat"]}, folder, saved)


class Odd(nn.Module):
    """Weights in another order of memory than C, tied ones, and units inside other wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.image = nn.Conv2d(3, 5, (3, 2)).to(memory_format=torch.channels_last)
        self.deep = nn.Sequential(checkpoint_wrapper(nn.Linear(3, 3)), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.deep(self.embed(x))
        image = torch.ones(1, 3, 4, 4, dtype=self.image.weight.dtype)
        return self.head(x).sum() + self.image(image).square().sum()


def build_odd(seed: int, *, shard: bool = True, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = Odd()
    if shard:
        model = wrapped(model, [model.deep], None, **options)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train_odd(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.arange(4) + step % 3).backward()
        optimizer.step()


def odd_tensors(model: nn.Module) -> Prints:
    found = {}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
            name = name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")
            found[name] = tensor.detach().clone()
    return prints(dict(sorted(found.items())))


def kept(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """What is in the state of each parameter: nothing where this rank has none of its elements."""
    return [list(optimizer.state.get(each, {})) for group in optimizer.param_groups for each in group["params"]]


def trains_odd(url: str) -> Prints:
    low = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for number, options in enumerate(
        [
            {"use_orig_params": True},
            {"use_orig_params": False},
            {"use_orig_params": True, "mixed_precision": low},
            {"use_orig_params": False, "mixed_precision": low, "sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
            {"use_orig_params": True, "mixed_precision": low, "sharding_strategy": ShardingStrategy.NO_SHARD},
        ]
    ):
        with Checkpointer(f"{url}/{number}", options=SMALL) as ckpt:
            model, optimizer = build_odd(1, **options)
            train_odd(model, optimizer, range(2))
            saved, entries = odd_tensors(model), kept(optimizer)
            ckpt.save(2, {"model": model, "optimizer": optimizer})
            train_odd(model, optimizer, range(2, 4))
            expected = odd_tensors(model)
            model, optimizer = build_odd(2, **options)
            train_odd(model, optimizer, range(number % 2))
            ckpt.restore({"model": model, "optimizer": optimizer})
            assert (odd_tensors(model), kept(optimizer)) == (saved, entries), options
            train_odd(model, optimizer, range(2, 4))
            assert odd_tensors(model) == expected, options
        if not number:
            whole_odd = saved
    return whole_odd


def restores_odd(url: str, saved: Prints) -> None:
    model, optimizer = build_odd(3, shard=False)
    with Checkpointer(f"{url}/0", options=SMALL) as ckpt:
        ckpt.restore({"model": model, "optimizer": optimizer})
    named = {name.replace("_checkpoint_wrapped_module.", ""): each for name, each in model.state_dict().items()}
    assert prints(dict(sorted(named.items()))) == saved
    assert optimizer.state[model.image.weight]["exp_avg"].shape == (5, 3, 3, 2)


def test_tied_permuted_and_wrapped_parameters_resume_exactly_in_full_precision(tmp_path: Path) -> None:
    saved = same(ranks.run(3, trains_odd, str(tmp_path)))
    ranks.run(1, restores_odd, str(tmp_path), saved)


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """Of evaluation, then of training."""
    return [model.train(mode)(torch.ones(2, 3)).detach() for mode in (False, True)]


def build_pair(seed: int, *, shard: bool = True, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    if shard:
        model = wrapped(model, [model[1]], None, **options)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def between_passes(url: str) -> None:
    # Evaluation then gathers parameters of its own, in full precision, beside those of training.
    os.environ["FSDP_USE_FULL_PREC_IN_EVAL"] = "1"
    plain, plain_optimizer = build_pair(1, shard=False)
    plain(torch.ones(2, 3)).sum().backward()
    plain_optimizer.step()
    strategies = ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD
    precisions = None, MixedPrecision(param_dtype=torch.bfloat16)
    for number, choice in enumerate(itertools.product(strategies, (True, False), precisions)):
        options = dict(zip(("sharding_strategy", "use_orig_params", "mixed_precision"), choice, strict=True))
        model, optimizer = build_pair(1, **options)
        state = {"model": model}
        with Checkpointer(f"{url}/{number}", options=SMALL) as ckpt:
            before = prints(whole(model, optimizer))
            loss = model(torch.ones(2, 3)).sum()
            ckpt.save(1, state).wait()  # between forward and backward
            loss.backward()
            optimizer.step()
            after = outputs(model)
            assert choice[-1] is not None or all(map(torch.equal, after, outputs(plain))), choice
            ckpt.save(2, state)
            for step, mode in itertools.product((1, 2), (False, True)):
                outputs(model)  # without a backward, which leaves parameters gathered
                model.train(mode)
                ckpt.restore(state, step=step)
                fresh, _ = build_pair(3, **options)
                ckpt.restore({"model": fresh}, step=step)
                now = outputs(model)
                assert all(map(torch.equal, now, outputs(fresh))), (choice, step)
                assert [torch.equal(*pair) for pair in zip(now, after, strict=True)] == [step == 2] * 2, (choice, step)
            ckpt.restore(state, step=1)
            assert prints(whole(model, optimizer)) == before, choice


def test_what_a_forward_pass_left_gathered_is_neither_saved_nor_kept_by_a_restore(tmp_path: Path) -> None:
    ranks.run(2, between_passes, str(tmp_path))


def refused(url: str) -> None:
    def make(original: bool, **options: Any) -> Any:
        net = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 5)), nn.Linear(5, 3))
        return wrapped(net, [net[1]], None, use_orig_params=original, **options)

    with Checkpointer(url, options=SMALL) as ckpt:
        for original in (True, False):
            model = make(original)
            for inside in (model.module, model.module[0]):
                with pytest.raises(ValueError, match=r"pieces in the flat parameter.*put the FullyShardedDataParallel"):
                    ckpt.save(1, {"model": inside})
            with FullyShardedDataParallel.summon_full_params(model):  # noqa: SIM117 - what raises is within
                with pytest.raises(ValueError, match="the module: this FSDP1 unit is inside summon_full_params"):
                    ckpt.save(1, {"model": model})
            errors: list[str] = []

            def hook(*_: object, model: Any = model, errors: list[str] = errors) -> None:
                with pytest.raises(ValueError, match=r"inside a forward or backward pass") as caught:
                    ckpt.save(1, {"model": model})
                errors.append(str(caught.value))

            handle = model.module[2].register_forward_hook(hook)
            model(torch.ones(1, 3))
            handle.remove()
            assert len(errors) == 1
            model.double()
            with pytest.raises(ValueError, match="moved or converted after its first forward pass"):
                ckpt.save(1, {"model": model})
        model = make(True)
        held = next(each for each in model.parameters() if each.numel())
        held.data = held.data.clone()
        with pytest.raises(ValueError, match="was given another tensor"):
            Describer().describe({"model": model})
        model = make(False)
        optimizer = torch.optim.SGD(model.parameters())
        for each in model.parameters():
            optimizer.state[each]["codes"] = TwoTensor(each.detach(), each.detach())
        with pytest.raises(TypeError, match=r"optimizer.state.0.weight.codes: a TwoTensor.*use .*fully_shard"):
            ckpt.save(1, {"model": model, "optimizer": optimizer})
        gaps = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
        gaps[0].weight = nn.Parameter(torch.rand(3, 4)[:, ::2])
        with pytest.raises(ValueError, match=r"model.0.weight: a parameter of shape .* has gaps"):
            Describer().describe({"model": wrapped(gaps, [], None)})
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        parallel = parallelize_module(nn.Sequential(nn.Linear(3, 4)), mesh["tp"], {"0": ColwiseParallel()})
        parallel = wrapped(parallel, [], mesh["dp"], use_orig_params=True)
        with pytest.raises(TypeError, match=r"0.weight is a DTensor inside an FSDP1 unit.*use .*fully_shard"):
            ckpt.save(1, {"model": parallel})


def test_what_fsdp1_cannot_show_is_refused_by_name(tmp_path: Path) -> None:
    ranks.run(2, refused, str(tmp_path))


def known_equal() -> dict[str, tuple[int, ...]]:
    """For each way to make a unit, the ranks it is known to be equal on."""
    parts = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    copies = [dist.new_group([0, 2]), dist.new_group([1, 3])][dist.get_rank() % 2]
    hybrid = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD}
    made = {
        "default": wrapped(nn.Linear(3, 3), [], None),
        "part": wrapped(nn.Linear(3, 3), [], None, process_group=parts),
        "mesh": wrapped(nn.Linear(3, 3), [], init_device_mesh("cpu", (2, 2)), **hybrid),
        "groups": wrapped(nn.Linear(3, 3), [], None, process_group=(parts, copies), **hybrid),
    }
    found = {}
    for kind, model in made.items():
        (among,) = Describer().describe({"model": model}).outline.offer.groups
        found[kind] = tuple(among)
    return found


def test_copies_are_known_to_be_equal_within_the_groups_of_their_unit_and_no_further() -> None:
    for rank, found in enumerate(ranks.run(4, known_equal)):
        everywhere = (0, 1, 2, 3)
        own = (0, 1) if rank < 2 else (2, 3)
        assert found == {"default": everywhere, "part": own, "mesh": everywhere, "groups": everywhere}


def in_a_loop(url: str) -> None:
    """The loop, ``train``, knows nothing of snapshots."""
    for kind in ("full flat", "gradients", "fsdp"):
        model, optimizer = build(kind, seed=1)
        train(model, optimizer, range(4))
        expected = prints(whole(model, optimizer))
        for seed, steps in ((1, range(3)), (2, range(2, 4))):
            model, optimizer = build(kind, seed=seed)
            if seed == 2:  # FSDP1 sets itself up in the first forward
                model(torch.ones(1, 3))
            state = {"model": model, "optimizer": optimizer}
            with Checkpointer(f"{url}/{kind}", options=SMALL) as ckpt:
                callback = fastckpt_fsdp.attach(ckpt, state, optimizer, every_steps=2, signals=())
                train(model, optimizer, steps)
                callback.on_train_end()
                assert [snapshot.step for snapshot in ckpt.snapshots()] == [2, 4][:seed]
        assert prints(whole(model, optimizer)) == expected, kind


def test_a_loop_one_does_not_own_resumes_once_its_optimizer_is_attached_to(tmp_path: Path) -> None:
    ranks.run(2, in_a_loop, str(tmp_path))


def attach_wrongly(url: str) -> None:
    model = nn.Linear(3, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(url, options=SMALL) as ckpt:
        with pytest.raises(ValueError, match="no module of the state is sharded by FSDP"):
            fastckpt_fsdp.attach(ckpt, {"model": model, "optimizer": optimizer}, optimizer, every_steps=1)
        shard: Any
        for shard in (fully_shard, lambda module: wrapped(module, [], None, use_orig_params=False)):
            model = nn.Linear(3, 5)
            early = torch.optim.SGD(model.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ConstantLR(early)
            state = {"model": shard(model), "optimizer": early}
            message = (
                r"\[0\]\['params'\]\[1\] of shape \[5\]. FSDP replaces a model's parameters: make the optimizer after"
            )
            with pytest.raises(ValueError, match=f"^optimizer: works on parameters that no module .*{message}"):
                fastckpt_fsdp.attach(ckpt, state, scheduler, every_steps=1)
            with pytest.raises(ValueError, match=f"^the optimizer that steps: works .*{message}"):
                fastckpt_fsdp.attach(ckpt, {"model": state["model"]}, scheduler, every_steps=1)


def test_an_optimizer_made_before_its_model_was_sharded_is_refused_with_its_parameters(tmp_path: Path) -> None:
    ranks.run(2, attach_wrongly, str(tmp_path))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.scale)


def lower_buffers(url: str) -> None:
    low = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    model, fresh, used = (wrapped(Scaled(), [], None, mixed_precision=low) for _ in range(3))
    model(torch.ones(1, 3))
    used(torch.ones(1, 3))
    plain = Scaled()
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model})
        for each in (fresh, used, plain):
            ckpt.restore({"model": each})
            assert torch.equal(each.scale.bfloat16(), model.scale)
    assert [each.scale.dtype for each in (fresh, used, plain)] == [torch.float32, torch.bfloat16, torch.float32]
    fresh(torch.ones(1, 3))
    assert torch.equal(fresh.scale, model.scale)


def test_buffers_kept_in_low_precision_are_saved_as_what_they_were_given_as(tmp_path: Path) -> None:
    ranks.run(2, lower_buffers, str(tmp_path))


def run_shown(code: str, url: str) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

    exec(code.replace("file:///tmp/run-42", url), {"model": nn.Linear(2, 2), "somebody_elses_loop": loop})
    with Checkpointer(url) as ckpt:
        assert [snapshot.step for snapshot in ckpt.snapshots()] == [1, 2]


def test_what_the_integrations_readme_shows_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "integrations/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ranks.run(2, run_shown, code.replace("every_steps=500", "every_steps=1"), str(tmp_path))
