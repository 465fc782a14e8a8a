"""Modules and task code of random scripts, as a user writes them. No Spindle is in here."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.scripts.random_scripts import Case, TaskCase
from tests.scripts.script_pieces import Batch, Named
from tests.scripts.script_towers import TOWERS, Scale, Teacher, tied_head


def modules_of(case: Case, step: int) -> dict[str, nn.Module]:
    """The components of a case as they are made before `step`, their weights always the same."""
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {}
    for component in case.components:
        if component.kind in TOWERS:
            made = TOWERS[component.kind](component.depth)
        elif component.kind == "teacher":
            made = Teacher(found[component.of])
        else:
            made = Scale() if component.kind == "scale" else tied_head(found[component.of])
        found[component.name] = made.double().train(not component.is_eval)
    freeze(case, found, step)
    return found


def freeze(case: Case, modules: Mapping[str, nn.Module], step: int) -> None:
    """Freeze what is frozen from `step` on, and nothing else."""
    for component in case.components:
        if component.kind in TOWERS and (component.kind != "frozen_in_part" or case.is_frozen(component.name, step)):
            modules[component.name].requires_grad_(not case.is_frozen(component.name, step))


def _through(modules: Mapping[str, nn.Module], chain: tuple[str, ...], batch: Batch, view: str) -> Tensor:
    first = modules[chain[0]]
    h: Tensor = first(batch["ids"] if hasattr(first, "embedding") else batch[view])
    for name in chain[1:]:
        h = modules[name](h)
    return h


def function_of(task: TaskCase, modules: Mapping[str, nn.Module]) -> Callable[[Batch], Tensor]:
    """A task's code, as a user writes it."""

    def function(batch: Batch) -> Tensor:
        _write_before(task, modules)
        h = _through(modules, task.towers, batch, "x")
        if task.loss == "contrastive":
            other = _through(modules, task.others, batch, "z")
            scale = modules[task.scale]() if task.scale else 2.0
            if {"clamp_data_after", "clamp_assigned_after"} & set(task.writes):
                scale = _scale(task, modules)  # which backward reads as it stands then
            logits = scale * F.normalize(h, dim=-1) @ F.normalize(other, dim=-1).T
            labels = torch.arange(logits.shape[0])
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            _clamp(task, modules, "_after")
            return loss
        if task.loss == "detached":
            with torch.no_grad():
                other = _through(modules, task.others, batch, "z")
            return F.mse_loss(h, other)
        if task.loss == "distill":
            return _distilled(task, modules, batch, h)
        if task.loss == "tied":
            return F.cross_entropy(modules[task.head](h), batch["word"])
        return F.mse_loss(h, batch["y"]) if task.loss == "mse" else F.cross_entropy(h, batch["label"])

    return function


def _write_before(task: TaskCase, modules: Mapping[str, nn.Module]) -> None:
    _clamp(task, modules)
    if "averaged_first" in task.writes:
        _follow(modules[task.teacher], modules[task.towers[0]], "averaged")
    if "momentum_count_first" in task.writes:
        _follow(modules[task.teacher], modules[task.towers[0]], "momentum_count")
    if "momentum_first" in task.writes:
        _follow(modules[task.teacher], modules[task.towers[0]], "momentum")


def _clamp(task: TaskCase, modules: Mapping[str, nn.Module], when: str = "") -> None:
    if f"clamp{when}" in task.writes:
        with torch.no_grad():
            _scale(task, modules).clamp_(max=0.999)
    if f"clamp_data{when}" in task.writes:
        _scale(task, modules).data.clamp_(max=0.999)
    if f"clamp_assigned{when}" in task.writes:
        scale = _scale(task, modules)
        scale.data = scale.data.clamp(max=0.999)


def _scale(task: TaskCase, modules: Mapping[str, nn.Module]) -> nn.Parameter:
    return modules[task.scale].get_parameter("log_scale")


def _follow(teacher: nn.Module, student: nn.Module, form: str) -> None:
    """Move the teacher's weights towards the student's."""
    assert isinstance(teacher, Teacher)
    if form.startswith("averaged"):
        teacher.average.update_parameters(student)
        return
    if form == "momentum_count":
        teacher.steps += 1
    for mine, others in zip(teacher.tower.parameters(), student.parameters(), strict=True):
        if form == "momentum_data":
            mine.data = mine.data * 0.9 + others.data * 0.1
            continue
        with torch.no_grad():
            if form == "momentum_lerp":
                mine.lerp_(others, 0.1)
            elif form == "momentum_count":
                mine.lerp_(others, 0.05 * (1 + torch.cos(teacher.steps / 3)))
            else:
                mine.mul_(0.9).add_(others, alpha=0.1)


def _distilled(task: TaskCase, modules: Mapping[str, nn.Module], batch: Batch, h: Tensor) -> Tensor:
    teacher = modules[task.teacher]
    assert isinstance(teacher, Teacher)
    with torch.no_grad():
        target = _through({**modules, task.towers[0]: teacher.tower}, task.towers, batch, "z")
    loss = F.mse_loss(h, target - teacher.center)
    if "center" in task.writes:
        with torch.no_grad():
            teacher.center.mul_(0.9).add_(target.mean(0), alpha=0.1)
    if "center_assigned" in task.writes:
        teacher.center = teacher.center * 0.9 + target.mean(0) * 0.1
    after = {"momentum", "momentum_lerp", "momentum_data", "momentum_count", "averaged"}
    for form in after & set(task.writes):
        _follow(teacher, modules[task.towers[0]], form)
    return loss


def named_parameters_of(modules: Mapping[str, nn.Module]) -> Named:
    """All parameters of a script, tied ones once, by component and path."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for component, module in modules.items():
        for name, parameter in module.named_parameters():
            found.setdefault(id(parameter), (f"{component}.{name}", parameter))
    return list(found.values())


def tensors_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    buffers = ((f"{component}.{n}", b) for component, module in modules.items() for n, b in module.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in (*named_parameters_of(modules), *buffers)}
