"""What the Triton kernels take. Here, for the kernels' own modules import Triton, and whoever asks may have none."""

# attention: a program keeps all blocks of a head's keys and values, by name.
MAX_TOKENS, HEAD_WIDTHS = 256, (32, 64)
# add_layer_norm: columns that a program holds.
MAX_WIDTH = 2048
# log_mel: what the sums of a program have room for.
MAX_MELS = 128
