"""The encoders that this package brings beside MATPAC's: the names of `load_encoder`, one line each.

`matpac_fast` imports this table; the file behind a name is imported when it is loaded. An encoder whose weights come
with this package is one line more, and a file whose `load` takes no argument, as `statistics.load`.
"""

from __future__ import annotations

from ..encoder import register_encoder

# name, where it is loaded, a name that only its own checkpoints hold
ENCODERS = (
    ("passt", "passt:load", "freq_new_pos_embed"),
    ("beats", "beats:load", "encoder.layers.0.self_attn.grep_linear.weight"),
    ("cnn14", "cnn14:load", "conv_block6.conv1.weight"),
    ("aisfx", "aisfx:load", None),
    ("torchcrepe", "crepe:load", None),
    ("hear", "hear_module:load", None),
    ("logmel-stats", "statistics:load", None),
)

for _name, _load, _mark in ENCODERS:
    register_encoder(_name, f"{__package__}.{_load}", _mark)
