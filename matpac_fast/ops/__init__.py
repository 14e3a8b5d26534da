"""The fused ops: tensors in, tensors out, on whatever backend fits the device.

Under a transform of torch.func (grad, vmap, jvp and what is made of them) and in forward mode the PyTorch reference
serves them all, which is differentiable as often as one likes.
"""

from .add_layer_norm import add_layer_norm
from .attention import attention
from .bias_gelu import bias_gelu
from .log_mel import log_mel
from .mask_shuffle import mask_shuffle
from .masked_patch_embed import masked_patch_embed
from .prediction_loss import prediction_loss
from .prototype_loss import prototype_loss

__all__ = [
    "add_layer_norm",
    "attention",
    "bias_gelu",
    "log_mel",
    "mask_shuffle",
    "masked_patch_embed",
    "prediction_loss",
    "prototype_loss",
]
