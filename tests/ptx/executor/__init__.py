"""Executes compiled PTX on a CPU, with checks that no run on a GPU makes.

All threads of a launch run at once, one element of a numpy array each. Data races, missing waits and fences,
uninitialised and misplaced accesses are reported from shadows of memory and registers, whatever the numbers are. The
executor counts instructions and memory traffic; it says nothing about a GPU's time.

    parser      text of a PTX module -> instructions
    translate   basic blocks -> Python functions over numpy arrays; opcodes/ has one emitter for each instruction
    machine     runs the threads of a launch: divergence, barriers, reports
    memory      global and shared memory with shadows; async_copy: cp.async
    matrix      mma.sync, ldmatrix, stmatrix; warpgroup: wgmma
    profile     instructions by class, wavefronts of shared memory, sectors of global memory
    triton_driver, resident_module   pcfast's own launch code on this executor

What is not modelled: the order and the truncation of a Tensor Core's sums (they are exact, rounded once), errors of
approximate functions (they are exact), memory ordering weaker than barriers, mbarrier, TMA, tcgen05 and clusters, and
what ptxas makes of the PTX. An instruction, or a modifier of one, that is not modelled raises
:class:`UnknownInstruction` with its name when its kernel is translated.
"""

from .machine import Deadlock, Launch, Report
from .memory import DeviceMemory
from .parser import parse
from .profile import Profile
from .translate import UnknownInstruction, translate

__all__ = [
    "Deadlock",
    "DeviceMemory",
    "Launch",
    "Profile",
    "Report",
    "UnknownInstruction",
    "parse",
    "translate",
]
