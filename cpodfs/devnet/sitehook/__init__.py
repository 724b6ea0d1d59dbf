"""The folder that a run's PYTHONPATH starts with; `sitecustomize` in it is what Python loads.

Holds nothing else: every module here would be importable by the user's scripts.
"""
