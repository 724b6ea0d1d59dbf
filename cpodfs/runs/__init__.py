"""Runs of compute pods: the driver's side (`manager`) and the process that minds a run (`supervisor`).

Stays empty on purpose: the supervisor imports this package on the way to a program's start, and
every import here is time between ``touch .run`` and the program's first instruction.
"""
