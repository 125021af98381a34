"""Every case, from single operations to an optimiser step."""

from parity import full_size, loss_cases, module_cases, network_cases, op_cases, step_cases
from parity.case import Case
from parity.options import Options

ENDS = (0, 3)  # recycling passes of the network where a few have to do


def cases(options: Options) -> list[Case]:
    """At reduced size, or at the size of a configuration, in the order of the ladder."""
    if options.config:
        return full_size.cases(options.config, options.overrides)
    few = options.quick and options.dtype != "float64"
    found = [
        *op_cases.cases(),
        *module_cases.cases(),
        *loss_cases.cases(),
        *network_cases.cases(ENDS if few else network_cases.PASSES),
        *step_cases.cases(),
    ]
    if options.quick and options.dtype == "float32":
        # what also runs in bfloat16 computes in float32 by the same lines
        found = [case for case in found if case.level > 1 or "bfloat16" not in case.dtypes]
    return found
