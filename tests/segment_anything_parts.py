"""Meta's segment-anything, an oracle of the export."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec

from torch import nn


def prompt_encoder_and_mask_decoder(size: int, mlp_dim: int) -> tuple[nn.Module, nn.Module]:
    """Of images of `size`², their weights not yet loaded."""
    if "segment_anything" not in sys.modules:
        # The package's own __init__ imports torchvision, which its modules do not need: they are imported without it.
        spec = find_spec("segment_anything")
        assert spec is not None
        sys.modules["segment_anything"] = module_from_spec(spec)
    from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=mlp_dim, num_heads=8)
    prompt = PromptEncoder(256, (size // 16, size // 16), (size, size), mask_in_chans=16)
    return prompt.eval(), MaskDecoder(transformer_dim=256, transformer=transformer).eval()
