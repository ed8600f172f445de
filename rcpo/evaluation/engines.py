"""What runs a model that answers: names of engines, and what is refused before one is loaded. Imports no
torch; `rcpo.evaluation.vllm_engine` is the engine that is not transformers."""

import importlib.util

from rcpo.common.errors import UserError

TRANSFORMERS, VLLM = "transformers", "vllm"
ENGINES = (TRANSFORMERS, VLLM)
ANSWERS_AT_ONCE = {TRANSFORMERS: 16, VLLM: 256}
"""Where nothing else is typed. vLLM itself decides how many it computes together; these are how many it is
given before what it wrote is kept."""


def refuse_missing_engine(engine: str) -> None:
    """Raise UserError where the engine is not installed."""
    if engine == VLLM and importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"engine={VLLM}: vLLM is not installed; type pip install 'rcpo[vllm]', or leave engine={VLLM} out"
        )


def refuse_images(engine: str, what: str) -> None:
    """Raise UserError where another engine than transformers would be shown images; `what` has them."""
    if engine != TRANSFORMERS:
        raise UserError(f"engine={engine}: is given text alone, and {what}; leave engine={engine} out")
