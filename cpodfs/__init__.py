"""cpodfs: compute pods as a filesystem.

FairOS-DFS pods are directories with a durable write-back cache; ``touch .run`` in a pod with a
recipe starts a Golem run. Layers point one way: cli → mount → fs → (sync → cache, dfs; runs) →
(recipe, paths, errors, config).
"""

__version__ = "0.1.0"
