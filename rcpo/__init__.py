"""rcpo: preference optimisation with reward calibration, and the metrics that show likelihood
displacement."""

__version__ = "0.1.0"
