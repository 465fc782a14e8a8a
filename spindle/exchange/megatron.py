"""A plan in; parallelisms by module, as Megatron-Bridge's MegatronMIMOParallelismConfig takes them, out.

Megatron runs each module in one layout on one range of ranks, from the first layer to the last, for all that it does.
A plan that gives a component other devices from slice to slice has no such form, and is refused in words.
"""

from collections.abc import Iterable
from itertools import combinations, pairwise

from spindle.errors import InputError, PlanError
from spindle.values.plan import Plan, Slice

LANGUAGE = "language"  # what Megatron calls the module that the others feed
NO_MODULES = ("glue", "loss")  # what tasks do between and after their components; there it is the language module's
SPLIT = "component_split"

Parallelism = dict[str, int]


def module_parallelisms(plan: Plan, language: str = LANGUAGE) -> dict[str, Parallelism]:
    """Keyword arguments of a ModuleParallelismConfig by module; component `language` becomes the language module.

    Raises PlanError, which names the component and its slices, when Megatron cannot run the plan's layout, and
    InputError when no component is called so.
    """
    slices = _by_component(plan)
    if language not in slices:
        raise InputError(f"no component is called {language!r}; say which is the language module: {', '.join(slices)}")
    if LANGUAGE in slices and language != LANGUAGE:
        raise InputError(
            f"{language!r} is to be Megatron's language module, but another component is called {LANGUAGE!r}; rename it"
        )
    if len(slices) == 1:
        raise _refused(plan, f"it has no component beside {language!r}; Megatron MIMO needs one that feeds it")
    names = {component: LANGUAGE if component == language else component for component in slices}
    found = {names[c]: _parallelism(plan, c, own) for c, own in slices.items()}
    _check_places(plan, found)
    for (one, a), (other, b) in combinations(found.items(), 2):
        few, many = sorted((a["data_parallel_size"], b["data_parallel_size"]))
        if many % few:
            raise _refused(
                plan, f"modules {one!r} and {other!r} have {few} and {many} copies; one must divide the other"
            )
    copies = found[LANGUAGE]["data_parallel_size"]
    for name, parallelism in found.items():
        if parallelism["data_parallel_size"] < copies:
            few = parallelism["data_parallel_size"]
            raise _refused(plan, f"module {name!r} has {few} copies, fewer than the {copies} of the language module")
    return found


def _by_component(plan: Plan) -> dict[str, list[Slice]]:
    if plan.metagraph is None:
        raise InputError("the plan carries no MetaGraph, which says what its components are; plan again")
    found: dict[str, list[Slice]] = {}
    for s in plan.slices:
        component = plan.metagraph[s.metaop].component or s.metaop
        if component not in NO_MODULES or plan.metagraph[s.metaop].layer_param_bytes:
            found.setdefault(component, []).append(s)
    return dict(sorted(found.items()))


def _parallelism(plan: Plan, component: str, slices: list[Slice]) -> Parallelism:
    first = slices[0]
    for s in slices:
        if (s.devices, s.tensor_parallel) != (first.devices, first.tensor_parallel):
            raise _refused(plan, f"component {component!r} changes its layout: {_said(first)}, then {_said(s)}")
    if any(b != a + 1 for a, b in pairwise(first.devices)):
        raise _refused(plan, f"component {component!r} has no range of devices: {_said(first)}")
    degree = first.tensor_parallel
    if degree & (degree - 1):
        raise _refused(plan, f"component {component!r} is cut {degree} ways; Megatron cuts in powers of two")
    return {
        "tensor_model_parallel_size": degree,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": len(first.devices) // degree,
        "rank_offset": first.devices[0],
    }


def _check_places(plan: Plan, found: dict[str, Parallelism]) -> None:
    """All modules on the same ranks, or each on ranks of its own."""
    ranges = {name: ranks(parallelism) for name, parallelism in found.items()}
    if len(set(ranges.values())) == 1:
        return
    for (one, a), (other, b) in combinations(ranges.items(), 2):
        if a.start < b.stop and b.start < a.stop:
            where = f"{one!r} is on devices {_ranges(a)}, {other!r} on {_ranges(b)}"
            raise _refused(plan, f"modules share some devices: {where}; Megatron wants all on the same, or none shared")


def ranks(parallelism: Parallelism) -> range:
    """The ranks of a module."""
    size = parallelism["tensor_model_parallel_size"] * parallelism["data_parallel_size"]
    return range(parallelism["rank_offset"], parallelism["rank_offset"] + size)


def _refused(plan: Plan, why: str) -> PlanError:
    remedy = f"; the nearest that may be is a plan of --method {SPLIT}" if plan.method != SPLIT else ""
    return PlanError(f"Megatron cannot run this plan: {why}{remedy}")


def _said(s: Slice) -> str:
    cut = f", cut {s.tensor_parallel} ways" if s.tensor_parallel > 1 else ""
    return f"{s.metaop}[{s.first_layer}:{s.last_layer + 1}] on devices {_ranges(s.devices)}{cut}"


def _ranges(devices: Iterable[int]) -> str:
    """Runs of neighbors: "0-3, 8"; the first few."""
    runs: list[list[int]] = []
    for device in devices:
        if runs and runs[-1][-1] + 1 == device:
            runs[-1].append(device)
        else:
            runs.append([device])
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")
