"""Settings for tests that run both tracks on small arrays."""

# each program runs once or twice: compiling it fast matters more than running it fast
FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
# several threads wait for each other far longer than such small arrays need
TORCH_THREADS = 1
