"""Modules: what components may not hold, refused by name before anything runs."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from spindle.errors import WorkloadError
from spindle.record.functions import SPARSE
from spindle.workload import Component, Workload

_SHARDED = ("FullyShardedDataParallel", "FSDPModule")

MAX_NORM = (
    "by which a lookup writes to its parameter, in the rows that the batch names; leave max_norm out and divide what "
    "is looked up by its norm, or clamp the rows in the step() of an optimizer of your own"
)
SYNCHRONIZED = (
    "which waits for statistics of all processes, and in a planned run some compute something else; leave out "
    "convert_sync_batchnorm: a plain BatchNorm has the statistics of the whole batch here"
)
_WRAPPERS: Mapping[str, str] = {
    "DistributedDataParallel": "adds 'module.' to the names of its parameters; register the plain module: planned "
    "runs reduce gradients themselves",
    "DataParallel": "spreads its batch over devices of its own, as plans do; register the plain module (its .module)",
    "OptimizedModule": "adds '_orig_mod.' to the names of its parameters (torch.compile); leave the layers as they "
    "are, and give component(compile=True) to have ranks compile them",
    "FullyShardedDataParallel": "holds parts of its parameters; register the plain module, before it is sharded, and "
    "plan with shard_optimizer=True or tensor_parallel=",
}


def refuse_modules(workload: Workload) -> None:
    """Raise WorkloadError where a component holds modules, or numbers, that no run can be planned with."""
    for component in workload.components.values():
        for path, module in component.module.named_modules():
            _check(component, path, module)
    for name, value in (*workload.named_parameters(), *workload.named_buffers()):
        if is_lazy(value):
            raise WorkloadError(
                f"{name!r} has no size yet (of a lazy module); call the module once on a batch before the workload is "
                "planned"
            )
        if value.dtype is torch.float16:
            raise WorkloadError(
                f"{name!r} is of float16, which is not offered, since its gradients need loss scaling; use bfloat16 "
                "(module.bfloat16()), or keep float32 and compute in bfloat16 by precision='bf16' of the workload"
            )


def _is_made_anew(module: nn.Module, name: str) -> bool:
    """Whether a hook computes this attribute before each forward: the older `spectral_norm`, `weight_norm`, pruning."""
    hooks = module._forward_pre_hooks.values()
    return any(
        isinstance(hook, SpectralNorm | WeightNorm | BasePruningMethod)
        and name == (hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name)
        for hook in hooks
    )


def _check(component: Component, path: str, module: nn.Module) -> None:
    where = f"component {component.name!r}" + (f": module {path!r}" if path else "")
    kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "torch"]
    if isinstance(module, torch.jit.ScriptModule):
        raise WorkloadError(
            f"{where} is compiled by torch.jit, so its code can be neither recorded nor cut; register the plain module "
            "that it was made of"
        )
    if getattr(module, "max_norm", None) is not None and isinstance(module, nn.Embedding | nn.EmbeddingBag):
        raise WorkloadError(f"{where} has max_norm={module.max_norm}, {MAX_NORM}")
    if isinstance(module, nn.SyncBatchNorm) and module.training:
        raise WorkloadError(f"{where} is a SyncBatchNorm, {SYNCHRONIZED}")
    if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
        raise WorkloadError(f"{where} has sparse=True, {SPARSE}")
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor) and not value.is_leaf:
            if _is_made_anew(module, name):
                setattr(module, name, value.detach())
                continue
            raise WorkloadError(
                f"{where} keeps in {name!r} a tensor that autograd has computed, which no copy of the module can have; "
                "delete it before the workload is planned"
            )
    found = next((kind for kind in kinds if kind in _WRAPPERS or kind in _SHARDED), None)
    if found is not None:
        kind = "FullyShardedDataParallel" if found in _SHARDED else found
        raise WorkloadError(f"{where} is wrapped in {found}, which {_WRAPPERS[kind]}")
