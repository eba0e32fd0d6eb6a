"""Operations in deviation form (docs/method.md fact 8).

A step evaluates one operation f at a base point a (``forward``), then any number of times the deviation
f(a + d) - f(a) for small d without cancellation (``deviate``), the product of its transposed Jacobian with an error
at the last point (``pullback``), and its parameters' gradients there (``gradients``). A chain does the same for a
whole PC layer, a node for one of several inputs.

State is kept in ``Precision.state``; matrix operands are cast to ``Precision.operand``. No autograd, except in
OpaqueStep for modules that pcfast does not know.
"""

from .chain import Chain, layer_chain
from .node import Node, PriorNode, node_at_work
from .step import difference

__all__ = ["Chain", "Node", "PriorNode", "difference", "layer_chain", "node_at_work"]
