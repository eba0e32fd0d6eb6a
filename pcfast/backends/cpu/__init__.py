"""A whole relaxation in one native call on the CPU (csrc/cpu/).

Rows never interact during relaxation (docs/method.md fact 4). So a thread takes a lane group of samples and runs
forward pass, loss, all iterations and local errors with their state in its own cache, and only the weight gradients,
after it, sum over the batch.
"""
