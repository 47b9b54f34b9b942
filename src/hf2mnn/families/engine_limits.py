"""Sizes of image processing that MNN 3.6.1 has built in.

`hf2mnn.mnn.engine_facts` lists them with all other facts about the engine. They are declared here because families are
imported before `hf2mnn.mnn`: an upgrade of the engine does not export a model again.

Source: `Omni::qwen2VisionProcess` in omni.cpp, where they are constants; no key of a configuration changes them.
"""

from __future__ import annotations

PATCH_SIZE = 14
"""Side of a patch in pixels."""
QWEN3_VL_PATCH_SIZE = 16
"""Side of a patch for a vision tower with the input `idx_tensor`."""
MERGE_SIZE = 2
"""Patches that are merged in each direction; sides of images are rounded to multiples of patch size x merge size."""
TEMPORAL_PATCH_SIZE = 2
"""Frames of a patch; an image is repeated."""
WINDOW = 4
"""Merged patches in each direction of an attention window (`vit_merger_window_size`), for the input `window_index`."""
DEEPSTACK_LAYERS = 3
"""Layers of `deepstack_embeds` where a prompt has no image (`Omni::load`, `Omni::embedding`)."""
IMAGE_SIZE = 420
"""Side in pixels of an image that comes without height and width: key `image_size`, 448 in the engine without it."""
