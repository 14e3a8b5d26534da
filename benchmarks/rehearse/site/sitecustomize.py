"""What every Python of a rehearsal does first: without cuDNN, which calls the driver in ways of its own."""

import torch

torch.backends.cudnn.enabled = False
torch.backends.cuda.enable_cudnn_sdp(False)
