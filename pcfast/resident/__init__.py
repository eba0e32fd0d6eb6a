"""The resident tier: one thread block keeps a network's weights and its samples' state for the whole relaxation.

Planning (placement.py, program.py) is pure Python; the kernel is csrc/resident/.
"""
