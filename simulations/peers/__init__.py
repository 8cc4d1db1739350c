"""Other systems that `python -m simulations.speed deployment` runs beside ours.

Their scripts are run by a Python of an environment of their own, in which they are installed: Isocenter depends on none of them.
"""
