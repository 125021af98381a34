"""Every case, from single operations to an optimiser step."""

from parity import full_size, loss_cases, module_cases, network_cases, op_cases, step_cases
from parity.case import Case
from parity.options import Options


def cases(options: Options) -> list[Case]:
    """At reduced size, or at the size of a configuration, in the order of the ladder."""
    if options.config:
        return full_size.cases(options.config, options.overrides)
    return [
        *op_cases.cases(),
        *module_cases.cases(),
        *loss_cases.cases(),
        *network_cases.cases(),
        *step_cases.cases(),
    ]
