"""Sizes of image processing that MNN 3.6.1 has built in: constants in `Omni::qwen2VisionProcess` of omni.cpp.

They are declared here because families are imported before `hf2mnn.mnn`: an upgrade of the engine does not export a
model again. `hf2mnn.mnn.engine_facts` has them with all other facts about the engine.
"""

PATCH_SIZE = 14
QWEN3_VL_PATCH_SIZE = 16  # of a vision tower with the input `idx_tensor`
MERGE_SIZE = 2  # patches merged in each direction; an image's sides are multiples of patch size x merge size
TEMPORAL_PATCH_SIZE = 2  # frames of a patch; an image is repeated
WINDOW = 4  # merged patches in each direction of a window (`vit_merger_window_size`), with the input `window_index`
DEEPSTACK_LAYERS = 3  # of `deepstack_embeds` where a prompt has no image (`Omni::load`, `Omni::embedding`)
MEDIA_TAGS = r"<(img|audio)>.*?</\1>"  # text that stands for a file, with images (`Omni::tokenizer_encode`)
IMAGE_SIZE = 420  # side in pixels of an image without height and width: key `image_size`, 448 without the key
