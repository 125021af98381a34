"""Every case, from single operations to an optimiser step."""

from parity import full_size, loss_cases, module_cases, network_cases, op_cases, step_cases
from parity.case import Case
from parity.options import Options

ENDS = (0, 3)  # recycling passes of the network where a few have to do
# modules whose parts are cases as well, and which the network holds as they are
WHOLES = ("evoformer block", "extra MSA block", "template_embedding", "structure_module")


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
    return [case for case in found if not (options.quick and _covered(case, options.dtype))]


def _covered(case: Case, dtype: str) -> bool:
    """Whether other cases nearly cover it: those in bfloat16 run the same lines as in float32."""
    doubled = dtype == "float32" and case.level == 1 and "bfloat16" in case.dtypes
    return doubled or case.name in WHOLES
