"""rcpo: preference optimisation with reward calibration, and the metrics that show likelihood
displacement."""

import logging

__version__ = "0.1.0"

# transformers imports DeepSpeed, which says on standard output that it found no GPU: no news on a CPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in str(record.msg))
