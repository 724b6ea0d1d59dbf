"""Keeps the remote tree equal to the local one, and the local one informed of the remote.

``planner`` decides the next server call for one object, ``ops`` are those calls, ``engine`` orders
and bounds them; ``lister`` and ``merge`` bring in what the server has; ``downloads`` fetch contents.
"""
