"""rcpo from Python: what `rcpo.train`, `rcpo.open_run`, `rcpo.compare`, `rcpo.Calibrator` and the others do.

Owns the classes that users hold and what they show in a notebook. Decides nothing that the commands do not:
it calls the same rooms. `rcpo/__init__.py` gives users these names, and imports them when they are asked for.
"""
