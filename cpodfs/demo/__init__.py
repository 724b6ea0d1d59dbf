"""``cpodfs demo``: the story that it tells (`story`) and the pod that it makes (``mandelbrot/``)."""
