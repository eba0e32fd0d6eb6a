"""Each fused kernel alone: ``pcfast bench --kernels``. Needs triton; imported where kernels are timed."""
