"""Development servers on loopback: a FairOS-DFS-compatible store and a local Golem market.

They run in a process of their own (``python -m cpodfs.devnet``); ``cpodfs.devnet.launch`` starts one
as a child. Modules here may import only leaves (errors, paths). Importing this package is cheap:
aiohttp is loaded by the modules that serve.
"""
