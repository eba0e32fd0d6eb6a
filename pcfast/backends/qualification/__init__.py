"""Which kinds of kernels give right numbers on a device: tested in child processes, recorded, asked by "auto".

record.py is the record and its file, run.py starts the children, automatic.py decides when that happens by itself.
The children's side, which tests, is pcfast/checking/qualification.py.
"""
