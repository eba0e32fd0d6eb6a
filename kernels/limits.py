"""What the kernels take at most."""

# Elements of a pooling window. Triton unrolls loops over them: 49 took 250 registers and 15 s to compile.
LARGEST_WINDOW = 16
