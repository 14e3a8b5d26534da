"""The fused ops: tensors in, tensors out, on whatever backend fits the device."""

from .attention import attention
from .log_mel import log_mel
from .mask_shuffle import mask_shuffle
from .masked_patch_embed import masked_patch_embed
from .prediction_loss import prediction_loss
from .prototype_loss import prototype_loss

__all__ = ["attention", "log_mel", "mask_shuffle", "masked_patch_embed", "prediction_loss", "prototype_loss"]
