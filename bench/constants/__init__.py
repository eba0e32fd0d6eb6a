"""A standalone CUDA program that measures a GPU's constants, and what builds and runs it."""
