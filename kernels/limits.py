"""Sizes that kernels and planner share: what kernels take at most, and how matrices have to lie. Without triton."""

# Elements of a pooling window. Triton unrolls loops over them: 49 took 250 registers and 15 s to compile.
LARGEST_WINDOW = 16
# Widest output whose loss is evaluated in the tile of its product, whose epilogue then has whole rows at once.
LOSS_COLUMNS = 64
# Matrices of the linear kernels start at multiples of so many elements, and so do rows of those that are padded:
# products read whole vectors.
ROW_MULTIPLE = 16
# Channels, or features, side by side in a tile of the pointwise kernels at most. A warp reads 512 bytes of a row of
# fp32: wider tiles only waste more of the last one.
POINTWISE_MAX_BLOCK_N = 128
