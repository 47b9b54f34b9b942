"""What the package assumes of MNN 3.6.1: defaults, keys, built-in sizes, codes, limits and errors of its LLM engine.

Each entry names its source in MNN at tag 3.6.1 and the modules that use it. Files without a folder are in
`transformers/llm/engine/src/`. Check every entry against a new release before it is supported.

Formats have modules of their own: weights `hf2mnn.quant.blob` (IDSTEncoder.hpp, ConvolutionCommon.cpp), the pattern of
a fused attention `hf2mnn.onnx.attention` (FuseAttention.cpp), the decoder's operators `hf2mnn.mnn.nc4hw4`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from hf2mnn.families.engine_limits import *  # noqa: F403  sizes of images

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
"""Files that the engine opens without the key. Source: llmconfig.hpp. Used by: doctor.artifacts."""
PATH_KEYS = (
    *("llm_config", "llm_model", "llm_weight", "block_model", "lm_model", "embedding_model", "embedding_file"),
    *("tokenizer_file", "visual_model", "npu_model_dir", "audio_model", "context_file", "talker_model"),
    *("talker_weight", "talker_embedding_file", "predit_model", "dit_model", "bigvgan_model", "spk_dict"),
    *("ple_embed_file", "lookup_file", "draft_model", "mtp_model", "eagle_model", "eagle_fc", "eagle_d2t"),
    *("dflash_model", "dflash_fc", "dflash_lmhead", "tmp_path", "prefix_cache_path"),
)
"""Keys of files, relative to config.json or absolute. Source: llmconfig.hpp. Used by: mnn.bundle_config."""
BASE_DIR = "base_dir"
"""Key of a folder for all paths. Source: llmconfig.hpp. Used by: doctor.checks.config, mnn.bundle_config."""
SETTING_DEFAULTS = {"thread_num": 4, "precision": "low", "memory": "low", "dynamic_option": 0, "attention_mode": 8}
"""Settings without the keys. Source: llmconfig.hpp, `Llm::setRuntimeHint` in llm.cpp. Used by: mnn.bundle_config."""
VISION_SETTINGS = ("thread_num", "precision", "memory")
"""Settings that the vision tower reads below "mllm"; the others hold for both parts.
Source: llmconfig.hpp, `Omni::load` in omni.cpp. Used by: mnn.bundle_config.
"""
BACKENDS = ("cpu", "metal", "cuda", "opencl", "opengl", "vulkan", "hexagon", "npu", "auto")
"""`backend_type`; others are "auto". Source: `backend_type_convert` in llm.cpp. Used by: mnn.engine_facts."""
PRECISIONS = ("low", "normal", "high")
"""`precision`, `memory` and `power`; others are "normal". Source: llm.cpp. Used by: mnn.engine_facts."""
SAMPLERS = ("greedy", "temperature", "topK", "topP", "minP", "min_p", "tfs", "typical", "penalty", "mixed")
"""Values of `sampler_type`. Source: sampler.cpp. Used by: mnn.engine_facts."""
DEVICE_SETTINGS = {
    "backend_type": Literal[BACKENDS],
    "thread_num": PositiveInt,
    **dict.fromkeys(("precision", "memory", "power"), Literal[PRECISIONS]),
}
"""Settings that decoder and vision tower have of their own, with their types.
Source: llmconfig.hpp. Used by: mnn.engine_facts.
"""
RUN_TIME_SETTINGS = DEVICE_SETTINGS | {
    "mllm": DEVICE_SETTINGS,
    "jinja": {"context": dict[str, Any]},
    "attention_mode": Annotated[int, Field(ge=0, le=14)],
    "dynamic_option": Literal[0, 1, 2, 8, 9, 10],
    "sampler_type": Literal[SAMPLERS],
    "mixed_samplers": list[Literal[SAMPLERS]],
    "penalty_sampler": Literal["greedy", "temperature"],
    "penalty_window": NonNegativeInt,
    "temperature": PositiveFloat,
    **dict.fromkeys(("topP", "top_p", "minP", "min_p", "tfsZ", "tfs_z", "typical"), NonNegativeFloat),
    **dict.fromkeys(("penalty", "repetition_penalty", "ngram_factor"), NonNegativeFloat),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), float),
    **dict.fromkeys(("topK", "top_k", "n_gram", "max_new_tokens", "max_all_tokens", "timeout_ms"), PositiveInt),
    **dict.fromkeys(("mmap_size", "cpu_sme2_neon_division_ratio", "cpu_sme_core_num"), PositiveInt),
    **dict.fromkeys(("draft_predict_length", "ngram_match_maxlen"), PositiveInt),
    **dict.fromkeys(("use_template", "reuse_kv", "use_mmap", "use_cached_mmap", "kvcache_mmap", "ngram_update"), bool),
    **dict.fromkeys(("system_prompt", "tmp_path", "prefix_cache_path", "lookup_file"), str),
    "logit_bias": dict[str, float],
    "banned_tokens": list[int],
    "speculative_type": Literal["", "lookahead"],
    "draft_match_strictness": Literal["low", "medium", "high"],
    "draft_selection_rule": Literal["freqxlen", "fcfs"],
}
"""Settings of config.json that an application may choose, with their types; all other keys belong to the model.

The engine takes a default for a value of another type. Left out: `all_logits`, `hidden_states` and `prompt_cache`, with
which it answers nothing or wrongly, and files of other drafts than `lookahead`.
Source: llmconfig.hpp, llm.cpp, docs/transformers/llm.md. Used by: mnn.bundle_config.
"""
MODEL_DEFAULTS = {"hidden_size": 4096, "layer_nums": 32, "attention_mask": "int", "is_mrope": False}
"""Sizes and inputs of the decoder without the keys. Source: llmconfig.hpp. Used by: doctor.checks.config."""
IMAGE_DEFAULTS = {
    "image_mean": [122.7709383, 116.7460125, 104.09373615],
    "image_norm": [0.01459843, 0.01500777, 0.01422007],
    "vision_start": 151857,
    "vision_end": 151858,
    "image_pad": 151859,
}
"""Images without the keys. Source: omni.hpp. Used by: doctor.checks.config, doctor.checks.tokenizer."""
TIE_EMBEDDINGS_KEYS = ("weight_offset", "alpha_offset", "alpha_size", "quant_bit", "quant_block", "half")
"""Entries of `tie_embeddings` where it is a list; the last one, scales in half floats, is optional.
Source: `LlmConfig::parseTieEmbeddings` in llmconfig.hpp. Used by: quant.embedding.
"""
QUANTIZED_EMBEDDING_BITS = (4, 8)
"""Bits of a quantized lm_head from which the engine reads the embedding. It reads 16 as bfloat16, any other as 4.
Source: diskembedding.cpp. Used by: doctor.checks.embedding, quant.embedding, quant.plan.
"""

# Images and positions -------------------------------------------------------------------------------------------------

IMAGE_TAG = "<img>image_{}</img>"
"""Text of a prompt that stands for an image in memory, by number.
Source: `Omni::processImageContent` in omni.cpp. Used by: mnn.worker.probe, mnn.worker.question, mnn.worker.session,
mnn.worker.speed.
"""
QUIRKS = {
    # After an image, decoding uses the number of tokens as position, not the largest M-RoPE position + 1.
    "A": ("Omni::gen_position_ids in omni.cpp", "mnn.worker.session.ModelSession.set_position"),
    # Text after vision_end continues from the last column, which is too small for images taller than wide.
    "B": ("MropeInfo in omni.hpp", "mnn.worker.session.ModelSession.prefill_images"),
    # A prompt that ends in image_pad repeats its last text tokens.
    "C": ("Omni::embedding in omni.cpp", "mnn.worker.session.ModelSession.prefill_images"),
    # With deepstack, text of two or more tokens after an image gets the deepstack features of the image.
    "D": ("Omni::embedding in omni.cpp", "mnn.worker.session.ModelSession.prefill_text"),
    # Images are resized bilinearly and without limits on the number of pixels.
    "E": ("Omni::qwen2VisionProcess in omni.cpp", "mnn.ask.continue_conversation"),
}
"""Differences from transformers by the letters of the docs: function in MNN, and the code that works around it.
Used by: mnn.worker.session, mnn.ask.
"""
GARBAGE_LOGIT = 1e30
"""Bound on the absolute value of logits: missing or wrong weights give finite values of about -3.4e38.
Source: measured. Used by: doctor.run, mnn.worker.session.
"""

# Graphs and the module API --------------------------------------------------------------------------------------------

UNSUPPORTED_OPERATORS = ("Extra", "Plugin")
"""Types of operators that the engine lacks. Source: schema/default/MNN.fbs. Used by: doctor.checks.files, mnn.graph."""
NC4HW4_SINCE = (3, 6, 1)
"""First release whose operators keep a decoder in the NC4HW4 layout: RoPE, LayerNorm with two outputs, MUL_SILU.
Source: source/backend/cpu/CPURoPE.cpp, CPULayerNorm.cpp, CPUAttention.cpp. Used by: mnn.nc4hw4.
"""
BACKEND_CONFIG = {"normal": 0, "high": 1, "low": 2}
"""Precision and memory of `BackendConfig` as the integers that `MNN.nn.create_runtime_manager` takes.
Source: include/MNN/MNNForwardType.h; pymnn ignores strings. Used by: mnn.worker.module.
"""

# Tokenizer files: `PipelineTokenizer::load_vocab_binary` reads tokenizer.mtok -----------------------------------------

TOKENIZER_MAGIC = 430
"""First number of a file. Source: tokenizer/tokenizer.hpp. Used by: mnn.tokenizer, mnn.tokenizer_file."""
PIPELINE = 4
"""Kind of tokenizer.mtok, binary. Source: tokenizer/tokenizer.hpp. Used by: mnn.tokenizer, mnn.tokenizer_file."""
TOKENIZER_KINDS = {0: "sentencepiece", 1: "tiktoken", 2: "bert", 3: "huggingface", PIPELINE: "pipeline"}
"""Second number of a file; all but the last are text. Source: tokenizer/tokenizer.hpp. Used by: mnn.tokenizer_file."""


class Normalizer(IntEnum):
    """Codes of normalizers. Source: tokenizer/tokenizer.cpp. Used by: mnn.tokenizer, mnn.tokenizer_file."""

    NONE, NFKC_WITHOUT_TABLE, PREPEND, REPLACE, SEQUENCE, BERT_WITHOUT_TABLE, NFKC, BERT, STRIP = range(9)


class PreTokenizer(IntEnum):
    """Codes of pre-tokenizers. Source: tokenizer/tokenizer.cpp. Used by: mnn.tokenizer, mnn.tokenizer_file."""

    NONE, BYTE_LEVEL, DIGITS, METASPACE, SPLIT, BERT, SEQUENCE = range(7)


class Model(IntEnum):
    """Codes of models. Source: tokenizer/tokenizer.cpp. Used by: mnn.tokenizer, mnn.tokenizer_file."""

    BPE, WORDPIECE, UNIGRAM = range(3)


class Decoder(IntEnum):
    """Codes of decoders. Source: tokenizer/tokenizer.cpp. Used by: mnn.tokenizer, mnn.tokenizer_file."""

    BYTE_LEVEL, BYTE_FALLBACK, METASPACE, WORDPIECE, FUSE, REPLACE, STRIP, SEQUENCE = range(8)


SPLIT_BEHAVIORS = {"Isolated": 0, "Removed": 1}
"""Behaviors of a Split that run as in tokenizers. Source: tokenizer/tokenizer.cpp. Used by: mnn.tokenizer."""

# Chat templates -------------------------------------------------------------------------------------------------------


class Jinja:
    """Constructs of chat templates that the engine renders as jinja2 does.

    Source: tokenizer/jinja.hpp (github.com/wangzhaode/jinja.cpp). Used by: mnn.template.
    """

    FUNCTIONS = frozenset({"range", "namespace", "strftime_now"})
    IGNORED_FUNCTIONS = frozenset({"raise_exception"})  # not run, and valid conversations do not reach it
    METHODS: ClassVar = {"startswith": 1, "endswith": 1, "split": 1, "lstrip": 1, "rstrip": 1, "strip": 1, "replace": 2}
    """Methods of strings, with the number of arguments that they read."""
    FILTERS = frozenset({"tojson", "string", "capitalize", "length", "trim", "items", "lower", "upper", "map"})
    IDENTITY_FILTERS = frozenset({"safe", "list"})
    """Unknown filters, which pass their value on, as these two do in chat templates."""
    TESTS = frozenset(
        "defined undefined none boolean string number sequence iterable mapping true false".split()  # noqa: SIM905
    )
    LOOP = frozenset({"index", "index0", "first", "last", "length"})
    ESCAPES = "nrt\\\"'bf"
    """Characters after a backslash in a string."""


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
