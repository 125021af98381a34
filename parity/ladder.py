"""Every case, from single operations to a training run."""

from parity import loss_cases, module_cases, network_cases, op_cases, step_cases
from parity.case import Case


def cases() -> list[Case]:
    """At reduced size, in the order of the ladder."""
    return [
        *op_cases.cases(),
        *module_cases.cases(),
        *loss_cases.cases(),
        *network_cases.cases(),
        *step_cases.cases(),
    ]
