"""What makes a model's own layers faster: Liger's kernels in place of some modules, and layers compiled.

Neither changes names or weights, so that checkpoints and final/ know nothing of it; both change rounding, so
policy and reference get the same. The head is rcpo's own anyway. Called by `rcpo.engine.engine` and
`rcpo.reference.live` on the model that they have loaded."""

import importlib.util

from torch import nn
from transformers import PreTrainedModel

from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.schema import ModelConfig
from rcpo.models.logit_transform import body_of

OF_LIGER = {"rms_norm": True, "swiglu": True, "geglu": True, "rope": True}
"""What is taken of it where it has them for an architecture."""
NOT_OF_LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check_speedups(config: ResolvedConfig) -> None:
    """Raise UserError where model.kernels or model.compile cannot work here; loads no model."""
    if config.model.kernels == "liger":
        if config.train.device == "cpu":
            raise UserError("model.kernels=liger: runs on GPUs alone; type model.kernels=null")
        if importlib.util.find_spec("liger_kernel") is None:
            raise UserError(
                "model.kernels=liger: needs the liger-kernel package; pip install 'rcpo[liger]', or type "
                "model.kernels=null"
            )


def speed_up(model: PreTrainedModel, config: ModelConfig) -> None:
    """Put kernels in place and compile layers as `config` says. Raises UserError where the architecture has
    none."""
    if config.kernels == "liger":
        _use_liger(model, config.path)
    if config.compile:
        for block in blocks_of(model, config.path):
            block.compile(dynamic=True)  # rows of every micro-batch have a width of their own


def _use_liger(model: PreTrainedModel, path: str) -> None:
    from liger_kernel.transformers import monkey_patch  # wants triton, which wants a GPU

    kind = model.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"model.kernels=liger: Liger has no kernels for {kind} (model.path={path}); type "
            "model.kernels=null"
        )
    monkey_patch._apply_liger_kernel_to_instance(model=model, **OF_LIGER, **NOT_OF_LIGER)


def blocks_of(model: PreTrainedModel, path: str) -> list[nn.Module]:
    """The model's layers. Raises UserError where it has no such list."""
    num_blocks = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in body_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks:
            return list(module)
    raise UserError(
        f"model.compile=true: {type(model).__name__} has no list of layers (model.path={path}); type "
        "model.compile=false"
    )
