"""What every Python of a rehearsal does first, in place of the machine's own sitecustomize: no cuDNN, which calls the
driver in ways of its own."""

import torch

torch.backends.cudnn.enabled = False
torch.backends.cuda.enable_cudnn_sdp(False)
