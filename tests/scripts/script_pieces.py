"""Loaders, optimizers and schedules of random scripts. No Spindle is in here."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, default_collate

from tests.scripts.script_towers import LENGTH, WIDTH, WORDS

Batch = dict[str, Any]
Named = list[tuple[str, nn.Parameter]]
Factory = Callable[[Any], torch.optim.Optimizer]
Scheduler = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


# -- data -------------------------------------------------------------------------------------------------------------


class Samples(Dataset[Batch]):
    """Samples with all fields that any task reads, their numbers always the same."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 100 + index)
        fields = {name: torch.randn(WIDTH, generator=generator, dtype=torch.float64) for name in ("x", "z", "y")}
        ids = torch.randint(WORDS, (LENGTH,), generator=generator)
        return {**fields, "ids": ids, "label": ids[0] % WIDTH, "word": ids[1]}


class SamplesByPass(Samples):
    """Other samples in each pass, as datasets that augment by its number have."""

    def set_epoch(self, number: int) -> None:
        """The pass that comes next."""
        self.seed = self.seed // 100 * 100 + number % 100


class Shuffled(BatchSampler):
    """Batches of samples in an order of each pass."""

    def set_epoch(self, number: int) -> None:
        """The pass that comes next."""
        assert isinstance(self.sampler, DistributedSampler)
        self.sampler.set_epoch(number)


def data_of(kind: str, samples: int, batch_size: int, seed: int) -> Any:
    """A task's data: a list of batches, a function that makes an iterator, or a loader. Loaders go in order, shuffle by
    a generator of their own or their sampler's, or tell a sampler, batch sampler or dataset the number of the pass.
    """
    dataset, generator = Samples(samples, 100 * seed), torch.Generator().manual_seed(seed)
    sampler: Any = DistributedSampler(dataset, num_replicas=1, rank=0, seed=seed)
    every = range(samples)
    parts = [every[low : low + batch_size] for low in range(0, samples, batch_size)]
    made: dict[str, Callable[[], Any]] = {
        "list": lambda: [default_collate([dataset[index] for index in part]) for part in parts],
        "function": lambda: lambda: (default_collate([dataset[index] for index in part]) for part in parts),
        "loader": lambda: DataLoader(dataset, batch_size),
        "shuffled": lambda: DataLoader(dataset, batch_size, shuffle=True, generator=generator),
        "random_sampler": lambda: DataLoader(dataset, batch_size, sampler=RandomSampler(dataset, generator=generator)),
        "set_epoch": lambda: DataLoader(dataset, batch_size, sampler=sampler),
        "set_epoch_batches": lambda: DataLoader(dataset, batch_sampler=Shuffled(sampler, batch_size, False)),
        "set_epoch_dataset": lambda: DataLoader(SamplesByPass(samples, 100 * seed), batch_size),
    }
    return made[kind]()


DATA = ("list", "function", "loader", "shuffled", "random_sampler", "set_epoch", "set_epoch_batches",
        "set_epoch_dataset")  # fmt: skip


def passes(data: Any, kind: str) -> Iterator[Batch]:
    """All batches of pass after pass, as a script for one process reads them."""
    told = {"set_epoch": "sampler", "set_epoch_batches": "batch_sampler", "set_epoch_dataset": "dataset"}.get(kind)
    for number in itertools.count():
        if told is not None:
            getattr(data, told).set_epoch(number)
        yield from data() if callable(data) else data


# -- optimizers -------------------------------------------------------------------------------------------------------

EPS = 1e-3
"""Of optimizers that divide by the size of gradients, so that the rounding noise of zeros stays noise."""


def _hf_adafactor(groups: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    made: torch.optim.Optimizer = Adafactor(groups, lr=None, eps=(EPS**2, 1e-3))
    return made


OPTIMIZERS: dict[str, Factory] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.03, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.03, momentum=0.8, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=EPS, weight_decay=0.1),
    "adam_amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, eps=EPS, amsgrad=True, weight_decay=0.01),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.03, eps=EPS, lr_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.003, eps=EPS, centered=True, momentum=0.5),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01, eps=EPS, momentum_decay=0.05),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.02, eps=(EPS, 1e-3)),
    "hf_adafactor": _hf_adafactor,
    "muon": lambda groups: torch.optim.Muon(groups, lr=0.02, eps=EPS),
}
"""By kind: from parameters, or groups of them, to an optimizer."""


def _by_dimension(named: Named) -> list[dict[str, Any]]:
    """The usual two groups, of which one may be empty."""
    return [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]


def _by_name(named: Named) -> list[dict[str, Any]]:
    """Norms and biases do not decay; a head or stem moves slower."""
    kinds: dict[str, list[nn.Parameter]] = {"plain": [], "stem": [], "rest": []}
    for name, parameter in named:
        kind = "plain" if name.endswith("bias") or "norm" in name else "stem" if "stem" in name else "rest"
        kinds[kind].append(parameter)
    settings = {"plain": {"weight_decay": 0.0}, "stem": {"lr": 0.004}, "rest": {}}
    return [{"params": held, **settings[kind]} for kind, held in kinds.items() if held]


def _by_depth(named: Named) -> list[dict[str, Any]]:
    """Layer-wise rates: a layer's number is the first number in its name."""
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in named:
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        groups.setdefault(numbers[0] + 1 if numbers else 0, []).append(parameter)
    return [{"params": held, "lr": 0.02 * 0.7**depth} for depth, held in sorted(groups.items(), reverse=True)]


GROUPS: dict[str, Callable[[Named], Any]] = {
    "one": lambda named: [parameter for _, parameter in named],
    "dimension": _by_dimension,
    "name": _by_name,
    "depth": _by_depth,
    "matrices": lambda named: [parameter for _, parameter in named if parameter.ndim == 2],
    "trained": lambda named: [parameter for _, parameter in named if parameter.requires_grad],
    "no_biases": lambda named: [{"params": [p for n, p in named if not n.endswith("bias")]}],
}
"""By kind: from named parameters to what an optimizer takes; those of BY_NAME look at the names."""
BY_NAME = ("name", "depth", "no_biases")


def factory_of(optimizer: str, groups: str) -> Factory:
    """A factory as a user writes one; its parameter's name says whether it takes parameters with their names."""
    make, arrange = OPTIMIZERS[optimizer], GROUPS[groups]

    def by_name(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return make(arrange(list(named_parameters)))

    def by_parameter(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        if groups == "one":
            return make(parameters)
        return make(arrange([("", parameter) for parameter in parameters]))

    return by_name if groups in BY_NAME else by_parameter


# -- schedules --------------------------------------------------------------------------------------------------------


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _warm(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.LinearLR(optimizer, 0.3, total_iters=2)


def _decay(rate: float) -> Callable[[int], float]:
    return lambda step: float(rate**step)


def _one_cycle(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    cycles = "betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum"))
    highest = [3 * rate for rate in _rates(optimizer)]
    return lr_scheduler.OneCycleLR(optimizer, highest, total_steps=9, cycle_momentum=cycles)


SCHEDULES: dict[str, Scheduler] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "lambdas": lambda optimizer: lr_scheduler.LambdaLR(
        optimizer, [_decay(0.9 - 0.2 * index) for index in range(len(optimizer.param_groups))]
    ),
    "one_cycle": _one_cycle,
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
    "warm_restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, 2),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [_warm(optimizer), lr_scheduler.StepLR(optimizer, 2, 0.5)], [2]
    ),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [_warm(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.8)]
    ),
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.3),
    "multi_step": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.4),
    "multiplicative": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, _decay(0.9)),
}
"""By kind: from an optimizer to its schedule."""

OF_USER: dict[str, Callable[[torch.optim.Optimizer, Iterable[int]], lr_scheduler.LRScheduler]] = {
    "user_lambdas": lambda optimizer, numbers: lr_scheduler.LambdaLR(
        optimizer, [_decay(0.9 - 0.2 * n) for n in numbers]
    ),
    "user_one_cycle": lambda optimizer, numbers: lr_scheduler.OneCycleLR(
        optimizer, [0.02 / (1 + n) for n in numbers], total_steps=9, cycle_momentum=False
    ),
}
"""Those with a list of a value for each of the user's groups: from an optimizer and the number of the user's group that
each of its groups stems from."""
