"""Every case, from single operations to an optimiser step."""

from parity import full_size, loss_cases, module_cases, network_cases, op_cases, step_cases
from parity.case import Case
from parity.options import Options

ENDS = (0, 3)  # recycling passes of the network where a few have to do
# modules whose parts are cases as well, and which the network holds as they are; the optimiser
# step has those with dropout
WHOLES = ("evoformer block", "extra MSA block", "template_embedding", "structure_module")
STACKS = "with dropout"  # ends their names


def cases(options: Options) -> list[Case]:
    """At reduced size, or at the size of a configuration, in the order of the ladder."""
    if options.config:
        return full_size.cases(options.config, options.overrides)
    found = [
        *op_cases.cases(),
        *module_cases.cases(),
        *loss_cases.cases(),
        *_network(options),
        step_cases.SMALL_CASES.step(),
    ]
    return [case for case in found if not (options.quick and _covered(case, options.dtype))]


def _network(options: Options) -> list[Case]:
    """At real widths, but quickly only where DeepMind's code takes part: see step_cases.py."""
    if not options.quick:
        return network_cases.cases()
    if options.dtype == "float64":
        return network_cases.cases(ENDS)
    return [step_cases.SMALL_CASES.network(ENDS)]


def trains(options: Options) -> bool:
    """Whether the training run of level 4 belongs to these."""
    return 4 in options.levels and not options.config


def _covered(case: Case, dtype: str) -> bool:
    """Whether other cases nearly cover it: both low precisions run the same lines."""
    doubled = dtype == "float32" and case.level == 1 and "bfloat16" in case.dtypes
    return doubled or case.name in WHOLES or case.name.endswith(STACKS)
