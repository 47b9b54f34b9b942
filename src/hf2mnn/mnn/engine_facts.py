"""What the package assumes of MNN 3.6.1: defaults, keys, built-in sizes, codes, limits and errors of its LLM engine.

Each entry names its source in MNN at tag 3.6.1 and the modules that use it. Files without a folder are in
`transformers/llm/engine/src/`. Check every entry against a new release before it is supported.

Formats have modules of their own: weights `hf2mnn.quant.blob` (IDSTEncoder.hpp, ConvolutionCommon.cpp), the pattern of
a fused attention `hf2mnn.onnx.attention` (FuseAttention.cpp), the decoder's operators `hf2mnn.mnn.nc4hw4`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from hf2mnn.families.engine_limits import DEEPSTACK_LAYERS as DEEPSTACK_LAYERS
from hf2mnn.families.engine_limits import IMAGE_SIZE as IMAGE_SIZE
from hf2mnn.families.engine_limits import MERGE_SIZE as MERGE_SIZE
from hf2mnn.families.engine_limits import PATCH_SIZE as PATCH_SIZE
from hf2mnn.families.engine_limits import QWEN3_VL_PATCH_SIZE as QWEN3_VL_PATCH_SIZE
from hf2mnn.families.engine_limits import TEMPORAL_PATCH_SIZE as TEMPORAL_PATCH_SIZE
from hf2mnn.families.engine_limits import WINDOW as WINDOW

# Configuration: config.json and llm_config.json ---------------------------------------------------------------------

FILE_DEFAULTS = {
    "llm_config": "llm_config.json",
    "llm_model": "llm.mnn",
    "llm_weight": "llm.mnn.weight",
    "visual_model": "visual.mnn",
    "embedding_file": "embeddings_bf16.bin",
    "tokenizer_file": "tokenizer.txt",
    "context_file": "context.json",
}
"""Files that the engine opens where the configuration does not have the key.

Source: llmconfig.hpp. Used by: doctor.artifacts.
"""
PATH_KEYS = (
    *("llm_config", "llm_model", "llm_weight", "block_model", "lm_model", "embedding_model", "embedding_file"),
    *("tokenizer_file", "visual_model", "npu_model_dir", "audio_model", "context_file", "talker_model"),
    *("talker_weight", "talker_embedding_file", "predit_model", "dit_model", "bigvgan_model", "spk_dict"),
    *("ple_embed_file", "lookup_file", "draft_model", "mtp_model", "eagle_model", "eagle_fc", "eagle_d2t"),
    *("dflash_model", "dflash_fc", "dflash_lmhead", "tmp_path", "prefix_cache_path"),
)
"""Keys whose values the engine opens as files: relative to the folder of config.json, or as given.

Source: llmconfig.hpp. Used by: mnn.bundle_config.
"""
BASE_DIR = "base_dir"
"""Key that replaces the folder of config.json in all paths.

Source: llmconfig.hpp. Used by: doctor.checks.config, mnn.bundle_config.
"""
SETTING_DEFAULTS = {"thread_num": 4, "precision": "low", "memory": "low", "dynamic_option": 0, "attention_mode": 8}
"""Run-time settings where the configuration does not have the key.

Source: llmconfig.hpp, `Llm::setRuntimeHint` in llm.cpp. Used by: mnn.bundle_config.
"""
VISION_SETTINGS = ("thread_num", "precision", "memory")
"""Settings that the vision tower reads below "mllm"; the others hold for both parts.

Source: llmconfig.hpp, `Omni::load` in omni.cpp. Used by: mnn.bundle_config.
"""
BACKENDS = ("cpu", "metal", "cuda", "opencl", "opengl", "vulkan", "hexagon", "npu", "auto")
"""Values of `backend_type`; any other is "auto".

Source: `backend_type_convert` in llm.cpp. Used by: doctor.artifacts.
"""
PRECISIONS = ("low", "normal", "high")
"""Values of `precision`, `memory` and `power`; any other is "normal".

Source: `Llm::initRuntime` in llm.cpp. Used by: doctor.artifacts.
"""
SAMPLERS = ("greedy", "temperature", "topK", "topP", "minP", "min_p", "tfs", "typical", "penalty", "mixed")
"""Values of `sampler_type`.

Source: sampler.cpp. Used by: doctor.artifacts.
"""
MODEL_DEFAULTS = {"hidden_size": 4096, "layer_nums": 32, "attention_mask": "int", "is_mrope": False}
"""Sizes and inputs of the decoder where the configuration does not have the key.

Source: llmconfig.hpp. Used by: doctor.checks.config.
"""
IMAGE_DEFAULTS = {
    "image_mean": [122.7709383, 116.7460125, 104.09373615],
    "image_norm": [0.01459843, 0.01500777, 0.01422007],
    "vision_start": 151857,
    "vision_end": 151858,
    "image_pad": 151859,
}
"""Normalization and token ids of images where the configuration does not have the key.

Source: omni.hpp. Used by: doctor.checks.image, doctor.checks.tokenizer.
"""
TIE_EMBEDDINGS_KEYS = ("weight_offset", "alpha_offset", "alpha_size", "quant_bit", "quant_block", "half")
"""Entries of `tie_embeddings` where it is a list; the last one, scales in half floats, is optional.

Source: `LlmConfig::parseTieEmbeddings` in llmconfig.hpp. Used by: quant.embedding.
"""
QUANTIZED_EMBEDDING_BITS = (4, 8)
"""Bits of a quantized lm_head from which the engine reads the embedding. It reads 16 as bfloat16, any other as 4.

Source: diskembedding.cpp. Used by: doctor.checks.embedding, quant.embedding, quant.plan.
"""

# Images and positions: built-in sizes are imported above --------------------------------------------------------------

MEDIA_TAGS = r"<(img|audio)>.*?</\1>"
"""Text of a prompt that an engine with a vision tower takes for the name of a file.

Source: `Omni::tokenizer_encode` in omni.cpp. Used by: mnn.ask.
"""
IMAGE_TAG = "<img>image_{}</img>"
"""Text of a prompt that stands for an image in memory, by number.

Source: `Omni::processImageContent` in omni.cpp. Used by: mnn.worker.probe, mnn.worker.question, mnn.worker.session,
mnn.worker.speed.
mnn.worker.speed.
"""


@dataclass(frozen=True)
class Quirk:
    """A difference of the engine from transformers.

    Attributes:
        source: Function in MNN.
        effect: What the engine does.
        handled_by: Name below `hf2mnn` of the code that works around it.
    """

    source: str
    effect: str
    handled_by: str


QUIRKS = {
    "A": Quirk(
        "Omni::gen_position_ids in omni.cpp",
        "after an image, decoding uses the number of tokens as position, not the largest M-RoPE position + 1",
        "mnn.worker.session.ModelSession.set_position",
    ),
    "B": Quirk(
        "MropeInfo in omni.hpp",
        "text after vision_end continues from the last column, which is too small for images taller than wide",
        "mnn.worker.session.ModelSession.prefill_images",
    ),
    "C": Quirk(
        "Omni::embedding in omni.cpp",
        "a prompt that ends in image_pad repeats its last text tokens",
        "mnn.worker.session.ModelSession.prefill_images",
    ),
    "D": Quirk(
        "Omni::embedding in omni.cpp",
        "with deepstack, text of two or more tokens after an image gets the deepstack features of the image",
        "mnn.worker.session.ModelSession.split_text",
    ),
    "E": Quirk(
        "Omni::qwen2VisionProcess in omni.cpp",
        "images are resized bilinearly and without limits on the number of pixels",
        "mnn.ask.continue_conversation",
    ),
}
"""Errors in positions and images of the engine, by the letters of docs and comments.

Used by: mnn.worker.session, mnn.ask.
"""
GARBAGE_LOGIT = 1e30
"""Bound on the absolute value of logits: missing or wrong weights give finite values of about -3.4e38.

Source: measured. Used by: doctor.run, mnn.worker.session.
"""

# Graphs and the module API --------------------------------------------------------------------------------------------

UNSUPPORTED_OPERATORS = ("Extra", "Plugin")
"""Types that the converter gives to operators that the engine does not have.

Source: schema/default/MNN.fbs. Used by: doctor.checks.graph, mnn.graph.
"""
NC4HW4_SINCE = (3, 6, 1)
"""First release whose operators keep a decoder in the NC4HW4 layout: RoPE, LayerNorm with two outputs, MUL_SILU.

Source: source/backend/cpu/CPURoPE.cpp, CPULayerNorm.cpp, CPUAttention.cpp. Used by: mnn.nc4hw4.
"""
BACKEND_CONFIG = {"normal": 0, "high": 1, "low": 2}
"""Precision and memory of `BackendConfig` as the integers that `MNN.nn.create_runtime_manager` takes.

Source: include/MNN/MNNForwardType.h; pymnn ignores strings. Used by: mnn.worker.module.
"""

# Tokenizer files ------------------------------------------------------------------------------------------------------

TOKENIZER_MAGIC = 430
"""First number of a tokenizer file.

Source: `Tokenizer::MAGIC_NUMBER` in tokenizer/tokenizer.hpp. Used by: mnn.tokenizer, mnn.tokenizer_file.
"""
PIPELINE = 4
"""Second number of a binary tokenizer file (tokenizer.mtok).

Source: `Tokenizer::TokenizerType` in tokenizer/tokenizer.hpp. Used by: mnn.tokenizer, mnn.tokenizer_file.
"""
TOKENIZER_KINDS = {0: "sentencepiece", 1: "tiktoken", 2: "bert", 3: "huggingface", PIPELINE: "pipeline"}
"""Second number of a tokenizer file; all kinds but the last are text (tokenizer.txt).

Source: `Tokenizer::TokenizerType` in tokenizer/tokenizer.hpp. Used by: mnn.tokenizer_file.
"""


class Normalizer(IntEnum):
    """Codes of normalizers in tokenizer.mtok.

    Source: `PipelineTokenizer::load_vocab_binary` in tokenizer/tokenizer.cpp. Used by: mnn.tokenizer,
    mnn.tokenizer_file.
    mnn.tokenizer_file.
    """

    NONE, NFKC_WITHOUT_TABLE, PREPEND, REPLACE, SEQUENCE, BERT_WITHOUT_TABLE, NFKC, BERT, STRIP = range(9)


class PreTokenizer(IntEnum):
    """Codes of pre-tokenizers in tokenizer.mtok.

    Source: `PipelineTokenizer::load_vocab_binary` in tokenizer/tokenizer.cpp. Used by: mnn.tokenizer,
    mnn.tokenizer_file.
    mnn.tokenizer_file.
    """

    NONE, BYTE_LEVEL, DIGITS, METASPACE, SPLIT, BERT, SEQUENCE = range(7)


class Model(IntEnum):
    """Codes of models in tokenizer.mtok.

    Source: `PipelineTokenizer::load_vocab_binary` in tokenizer/tokenizer.cpp. Used by: mnn.tokenizer,
    mnn.tokenizer_file.
    mnn.tokenizer_file.
    """

    BPE, WORDPIECE, UNIGRAM = range(3)


class Decoder(IntEnum):
    """Codes of decoders in tokenizer.mtok.

    Source: `PipelineTokenizer::load_vocab_binary` in tokenizer/tokenizer.cpp. Used by: mnn.tokenizer,
    mnn.tokenizer_file.
    mnn.tokenizer_file.
    """

    BYTE_LEVEL, BYTE_FALLBACK, METASPACE, WORDPIECE, FUSE, REPLACE, STRIP, SEQUENCE = range(8)


SPLIT_BEHAVIORS = {"Isolated": 0, "Removed": 1}
"""Behaviors of a Split pre-tokenizer that the engine runs as the tokenizers library does.

Source: `SplitPreTokenizer` in tokenizer/tokenizer.cpp. Used by: mnn.tokenizer.
"""
CLEAN_UP_SPACES = 1
"""Flag in tokenizer.mtok: decoding removes spaces before punctuation.

Source: `PipelineTokenizer::load_vocab_binary` in tokenizer/tokenizer.cpp. Used by: mnn.tokenizer.
"""

# Chat templates: what the engine's Jinja runs as jinja2 does ----------------------------------------------------------


class Jinja:
    """Constructs of chat templates that the engine renders as jinja2 does.

    Source: tokenizer/jinja.hpp (github.com/wangzhaode/jinja.cpp). Used by: mnn.template.

    Attributes:
        FUNCTIONS: Functions.
        IGNORED_FUNCTIONS: Functions that the engine does not run and that valid conversations do not reach.
        METHODS: Methods of strings, with the number of arguments that they read.
        FILTERS: Filters.
        IDENTITY_FILTERS: Unknown filters, which pass their value on, as these two do in chat templates.
        TESTS: Tests.
        LOOP: Attributes of `loop`.
        ESCAPES: Characters after a backslash in a string.
    """

    FUNCTIONS = frozenset({"range", "namespace", "strftime_now"})
    IGNORED_FUNCTIONS = frozenset({"raise_exception"})
    METHODS: ClassVar = {"startswith": 1, "endswith": 1, "split": 1, "lstrip": 1, "rstrip": 1, "strip": 1, "replace": 2}
    FILTERS = frozenset({"tojson", "string", "capitalize", "length", "trim", "items", "lower", "upper", "map"})
    IDENTITY_FILTERS = frozenset({"safe", "list"})
    TESTS = frozenset(
        {
            "defined",
            "undefined",
            "none",
            "boolean",
            "string",
            "number",
            "sequence",
            "iterable",
            "mapping",
            "true",
            "false",
        }
    )
    LOOP = frozenset({"index", "index0", "first", "last", "length"})
    ESCAPES = "nrt\\\"'bf"


# Output ---------------------------------------------------------------------------------------------------------------

INFORMATION = ("The device supports", "Warning: module need new clone")
"""Beginnings of lines that the engine prints although nothing is wrong.

Source: source/backend/cpu/CPURuntime.cpp, express/module/Module.cpp. Used by: mnn.engine.
"""
MESSAGES = {
    "kv_cache_input": r"past_key_values.*is input but not found",
    "graph_inputs": r"tensor \[ .* \] is input but not found|Can't find output",
    "file_missing": r"(tokenizer|LLM model|LLM weight) file not found|permission denied",
    "tokenizer": r"magic number is wrong|load tokenizer|load tokenzier",
    "weights": r"weightLength is 0|can't extract IDST|Read shape error|Can't open file:.*weight"
    r"|Rebuild External Op failed|[Ee]xternal is nullptr|Read file Error",
    "embedding": r"embedding file",
    "operator": r"Don't support|[Cc]reate execution error|Can't create|not support|Plugin|EXTRA|Extra",
    "shapes": r"[Cc]ompute [Ss]hape|[Rr]esize error|Broad cast error|compute size|Error for concat size",
    "memory": r"Memory Alloc Failed|OOM|Alloc memory|bad_alloc",
    "graph_file": r"Can't open file|Load module failed|Invalid net|Invalidate buffer|Create module error"
    r"|Error for open",
}
"""Lines that the engine prints before it fails, by cause; the first pattern that matches applies.

Source: llm.cpp, tokenizer/tokenizer.cpp, diskembedding.cpp, express/module/PipelineModule.cpp,
source/core/FileLoader.cpp, source/core/Pipeline.cpp. Used by: doctor.run.
"""
