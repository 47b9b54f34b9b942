"""Oddities of checkpoints as people publish them: each changes a small checkpoint folder, and names its source.

The sources are public issues, pull requests and model repositories. `test_oddities.py` compares each changed folder
with what transformers reads in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION, IMAGES, PROCESSOR = "generation_config.json", "preprocessor_config.json", "processor_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, LEGACY_TEMPLATE = "chat_template.jinja", "chat_template.json"
HEAD = "lm_head.weight"
LAYER = "layers.1.mlp.down_proj.weight"
"""End of the name of a linear layer's weight that every family has."""
GITHUB = "https://github.com/"
SAME, REFUSED, EITHER = "same", "refused", "either"


@dataclass(frozen=True)
class Oddity:
    """A change of a checkpoint, and the expected result.

    `expected` is SAME where everything must be read as transformers reads it, REFUSED where `fetch` must refuse the
    folder, and EITHER where both are right. `because` is the reason of a refusal of what transformers loads; without
    it, transformers must fail or draw weights at random. A refusal names one of `names`.
    """

    name: str
    source: str
    family: str  # key of SHAPES
    change: Callable[[Path], None]
    concerns: frozenset[str]  # of "weights", "config", "tokenizer", "chat", "stop" and "images"
    expected: str
    because: str
    names: tuple[str, ...]


ODDITIES: list[Oddity] = []


def oddity(
    family: str, source: str, concerns: str, expected: str = SAME, because: str = "", names: Iterable[str] = ()
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a function that changes a folder; its name is the oddity's."""

    def register(change: Callable[[Path], None]) -> Callable[[Path], None]:
        name = change.__name__.replace("_", " ")
        address = source if source.startswith("https:") else GITHUB + source
        ODDITIES.append(
            Oddity(name, address, family, change, frozenset(concerns.split()), expected, because, tuple(names))
        )
        return change

    return register


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content, indent=1))


def edit(folder: Path, name: str, *removed: str, **changes: Any) -> None:
    """Set and remove keys of a JSON file."""
    content = {**(read(folder, name) if (folder / name).exists() else {}), **changes}
    write(folder, name, {key: value for key, value in content.items() if key not in removed})


def edit_text(folder: Path, *removed: str, **changes: Any) -> None:
    """Set and remove settings of the decoder, which config.json nests for a vision-language model."""
    config = read(folder, CONFIG)
    if "text_config" not in config:
        edit(folder, CONFIG, *removed, **changes)
        return
    text = {key: value for key, value in {**config["text_config"], **changes}.items() if key not in removed}
    edit(folder, CONFIG, text_config=text)


def flatten(folder: Path) -> None:
    """Move the settings of the decoder to the top of config.json, as before transformers 5."""
    config = read(folder, CONFIG)
    text = config.pop("text_config")
    write(folder, CONFIG, {**text, **config})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}


def store(
    folder: Path, content: dict[str, torch.Tensor], name: str = WEIGHTS, metadata: dict[str, str] | None = None
) -> None:
    """Replace a safetensors file."""
    (folder / name).unlink(missing_ok=True)
    save_file(content, folder / name, {"format": "pt"} if metadata is None else metadata)


def rename(folder: Path, renamed: Callable[[str], str]) -> None:
    store(folder, {renamed(name): tensor for name, tensor in tensors(folder).items()})


def shard(folder: Path, pattern: str = "model-{:05d}-of-{:05d}.safetensors", count: int = 2) -> dict[str, str]:
    """Split model.safetensors into shards, write the index, and return its weight_map."""
    content, weight_map = tensors(folder), {}
    (folder / WEIGHTS).unlink()
    names = sorted(content)
    for number in range(count):
        file = pattern.format(number + 1, count)
        part = {name: content[name] for name in names[number::count]}
        store(folder, part, file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    write(folder, INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})


def layer_name(content: dict[str, torch.Tensor]) -> str:
    return next(name for name in content if name.endswith(LAYER))


def embedding_name(content: dict[str, torch.Tensor]) -> str:
    return next(name for name in content if name.endswith("embed_tokens.weight"))


def token(content: str, number: int | None = None, **changes: Any) -> dict[str, Any]:
    """Return an entry of added_tokens in tokenizer.json, or of added_tokens_decoder without `number`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return ({} if number is None else {"id": number}) | {"content": content} | flags | changes


NEXT_ID = 563
"""First id after the tokens of the small checkpoints."""


# Weights: values and names -------------------------------------------------------------------------------------------


@oddity("qwen2", "hiyouga/LlamaFactory/issues/6749", "weights config")
def tied_config_with_another_head_stored(folder: Path) -> None:
    content = tensors(folder)
    store(folder, content | {HEAD: content[embedding_name(content)].flip(0).contiguous()})


@oddity("qwen2", "vllm-project/vllm/pull/3344", "weights")
def tied_config_with_an_equal_head_stored(folder: Path) -> None:
    content = tensors(folder)
    store(folder, content | {HEAD: content[embedding_name(content)].clone()})


@oddity("qwen3-vl", "QwenLM/Qwen3-VL-Embedding/issues/89", "weights", REFUSED, names=[HEAD])
def untied_config_without_a_head(folder: Path) -> None:
    content = tensors(folder)
    del content[HEAD]
    store(folder, content)


@oddity("qwen2", "huggingface/transformers/issues/34759", "weights")
def tied_head_stored_in_place_of_the_embedding(folder: Path) -> None:
    content = tensors(folder)
    store(folder, {HEAD if name == embedding_name(content) else name: tensor for name, tensor in content.items()})


@oddity("llama", "huggingface/transformers/pull/35255", "weights")
def rotary_frequencies_stored(folder: Path) -> None:
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(16) for layer in range(4)}
    store(folder, tensors(folder) | frequencies)


@oddity("smollm3", "modelscope/ms-swift/issues/5812", "weights")
def names_without_the_prefix_of_the_decoder(folder: Path) -> None:
    rename(folder, lambda name: name.removeprefix("model."))


@oddity("qwen2.5-vl", "ahydchh/Impromptu-VLA/issues/52", "weights")
def names_of_vision_language_models_before_4_52(folder: Path) -> None:
    rename(folder, lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual."))


@oddity("qwen3-vl", "unslothai/unsloth-zoo/pull/773", "weights", REFUSED, names=["weight"])
def names_with_the_prefixes_in_another_order(folder: Path) -> None:
    swapped = ("model.language_model.", "language_model.model.")
    rename(folder, lambda name: name.replace(*swapped).replace("model.visual.", "visual."))


@oddity("llama", "huggingface/transformers/issues/25205", "weights", REFUSED, names=["weight"])
def names_of_a_compiled_model(folder: Path) -> None:
    rename(folder, lambda name: f"_orig_mod.{name}")


@oddity("qwen2", "AnswerDotAI/fsdp_qlora/issues/70", "weights", REFUSED, names=["weight"])
def names_of_a_model_wrapped_by_peft(folder: Path) -> None:
    rename(folder, lambda name: "base_model.model." + name.replace("_proj.weight", "_proj.base_layer.weight"))


@oddity("qwen3", "OpenRLHF/OpenRLHF/issues/839", "weights", REFUSED, names=[LAYER])
def empty_tensor_of_a_partitioned_model(folder: Path) -> None:
    content = tensors(folder)
    store(folder, content | {layer_name(content): torch.empty(0, dtype=torch.bfloat16)})


@oddity("qwen3", "huggingface/trl/pull/5295", "weights", REFUSED, names=[HEAD, "score.weight", "architectures"])
def reward_model_with_a_score_in_place_of_the_head(folder: Path) -> None:
    content = tensors(folder)
    head = content.pop(HEAD)
    store(folder, content | {"score.weight": head[:1].clone()})
    edit(folder, CONFIG, architectures=["Qwen3ForSequenceClassification"])


@oddity(
    "llama", "OpenRLHF/OpenRLHF/issues/209", "weights", EITHER, "a value head is of no use", ["value_head", "v_head"]
)
def value_head_among_the_weights(folder: Path) -> None:
    store(folder, tensors(folder) | {"value_head.weight": torch.ones(1, 256, dtype=torch.bfloat16)})


@oddity(
    "qwen3",
    "unslothai/unsloth/issues/6200",
    "weights",
    REFUSED,
    "transformers uses the weights without their scales",
    [LAYER, "weight_scale_inv", "F8_E4M3"],
)
def scales_of_fp8_without_quantization_config(folder: Path) -> None:
    content = tensors(folder)
    name = layer_name(content)
    content[name] = content[name].to(torch.float8_e4m3fn)
    store(folder, content | {f"{name}_scale_inv": torch.full((1, 3), 0.5)})


@oddity(
    "mistral",
    "vllm-project/compressed-tensors/issues/832",
    "weights",
    REFUSED,
    "transformers uses the weights without their scales",
    [LAYER, "weight_scale", "I8"],
)
def scales_of_int8_without_quantization_config(folder: Path) -> None:
    content = tensors(folder)
    name = layer_name(content)
    content[name] = (content[name].float() * 100).round().to(torch.int8)
    store(folder, content | {f"{name}_scale": torch.full((content[name].shape[0], 1), 0.01)})


@oddity("llama", "haotian-liu/LLaVA/issues/1266", "weights", REFUSED, names=[LAYER, "absmax", "quant"])
def statistics_of_bitsandbytes_without_quantization_config(folder: Path) -> None:
    content = tensors(folder)
    name = layer_name(content)
    size = content[name].numel()
    content[name] = torch.zeros(size // 2, 1, dtype=torch.uint8)
    store(folder, content | {f"{name}.absmax": torch.ones(size // 64), f"{name}.quant_map": torch.ones(16)})


@oddity("qwen2", "oobabooga/textgen/pull/1668", "weights", REFUSED, names=["mlp.down_proj", "quantization_config"])
def gptq_layers_without_quantization_config(folder: Path) -> None:
    content = tensors(folder)
    name = layer_name(content)
    rows, columns = content.pop(name).shape
    layer = name.removesuffix(".weight")
    content[f"{layer}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
    content[f"{layer}.qzeros"] = torch.zeros(columns // 32, rows // 8, dtype=torch.int32)
    content[f"{layer}.scales"] = torch.ones(columns // 32, rows, dtype=torch.float16)
    store(folder, content)
    write(folder, "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False})


@oddity(
    "qwen3",
    "vllm-project/vllm/pull/34888",
    "weights",
    EITHER,
    "a layer beyond num_hidden_layers may belong to the model",
    ["layers.5", "num_hidden_layers"],
)
def layer_for_multi_token_prediction(folder: Path) -> None:
    content = tensors(folder)
    extra = {name.replace(".4.", ".5."): tensor.clone() for name, tensor in content.items() if ".layers.4." in name}
    store(folder, content | extra)


@oddity("mistral", "NikoNairre/CT-CIG/issues/3", "weights", EITHER, "no result is right with it", ["norm.weight"])
def nan_in_a_norm(folder: Path) -> None:
    content = tensors(folder)
    content["model.norm.weight"][3] = torch.nan
    store(folder, content)


@oddity("qwen2.5-vl", "H-EmbodVis/NAUTILUS/issues/5", "weights")
def layers_of_zeros(folder: Path) -> None:
    content = tensors(folder)
    store(folder, {name: tensor * (".layers.2." not in name) for name, tensor in content.items()})


@oddity("llama", "huggingface/transformers/issues/25729", "weights", REFUSED, names=["embed_tokens", "vocab_size"])
def embedding_resized_without_vocab_size(folder: Path) -> None:
    content = tensors(folder)
    name = embedding_name(content)
    store(folder, content | {name: torch.cat([content[name], content[name][:64]])})


@oddity("qwen3", "huggingface/transformers/issues/29955", "weights")
def norms_in_float32(folder: Path) -> None:
    store(folder, {name: t.float() if "norm" in name else t for name, t in tensors(folder).items()})


@oddity("smollm3", "huggingface/transformers/pull/12316", "weights")
def weights_in_float16(folder: Path) -> None:
    store(folder, {name: tensor.half() for name, tensor in tensors(folder).items()})
    edit(folder, CONFIG, "dtype", torch_dtype="float32")


# Weights: files ------------------------------------------------------------------------------------------------------


@oddity("qwen2", "ml-explore/mlx/issues/743", "weights")
def file_without_metadata(folder: Path) -> None:
    store(folder, tensors(folder), metadata={})


@oddity("llama", "Blaizzy/mlx-vlm/pull/1827", "weights")
def index_left_beside_a_single_file(folder: Path) -> None:
    write_index(folder, dict.fromkeys(tensors(folder), "model-00001-of-00013.safetensors"))


@oddity("mistral", "Blaizzy/nativ/pull/370", "weights", REFUSED, names=[INDEX, "00001-of-00013"])
def index_of_another_build(folder: Path) -> None:
    weight_map = shard(folder)
    write_index(folder, dict.fromkeys(weight_map, "model-00001-of-00013.safetensors"))


@oddity("qwen2", "Neph0s/CoSER/issues/3", "weights", REFUSED, names=[INDEX, "safetensors"])
def shards_without_an_index(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).unlink()


@oddity("qwen3", "unslothai/unsloth-zoo/pull/346", "weights")
def one_shard_with_an_index(folder: Path) -> None:
    shard(folder, count=1)


@oddity("qwen3-vl", "Blaizzy/mlx-vlm/pull/1464", "weights", REFUSED, names=["U32", "quantization_config"])
def four_bit_file_beside_shards(folder: Path) -> None:
    content = tensors(folder)
    shard(folder)
    name = layer_name(content)
    layer = name.removesuffix(".weight")
    rows, columns = content[name].shape
    content[name] = torch.zeros(rows, columns // 8, dtype=torch.uint32)
    content |= {f"{layer}.{part}": torch.ones(rows, columns // 32) for part in ("scales", "biases")}
    store(folder, content, metadata={"format": "mlx"})


@oddity("qwen2", "JustVugg/colibri/issues/1479", "weights", EITHER, "two files hold a tensor", ["overlay", LAYER])
def overlay_shard_that_the_index_prefers(folder: Path) -> None:
    content = tensors(folder)
    weight_map = shard(folder)
    name, file = layer_name(content), "model-overlay-00001.safetensors"
    store(folder, {name: content[name] * 2}, file)
    write_index(folder, weight_map | {name: file})


@oddity("mistral", "vllm-project/vllm/issues/40765", "weights")
def consolidated_file_beside(folder: Path) -> None:
    content = tensors(folder)
    store(folder, {"tok_embeddings.weight": content[embedding_name(content)]}, "consolidated.safetensors")
    write(folder, "params.json", {"dim": 128, "n_layers": 4})


@oddity("llama", "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct/tree/main/original", "weights")
def original_weights_in_a_subfolder(folder: Path) -> None:
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"\x80\x04.")
    write(folder / "original", "params.json", {"dim": 256})


@oddity("qwen2", "vllm-project/vllm/pull/2480", "weights")
def pickled_weights_beside(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")


@oddity(
    "qwen2",
    "huggingface/peft/issues/1381",
    "weights",
    REFUSED,
    "where PEFT is installed, transformers applies the merged adapter again",
    ["adapter_config.json"],
)
def adapter_beside_the_merged_model(folder: Path) -> None:
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{layer}.lora_A.weight": torch.ones(2, 160), f"{layer}.lora_B.weight": torch.ones(160, 2)}
    store(folder, factors, "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    write(folder, "adapter_config.json", settings | {"base_model_name_or_path": "Qwen/Qwen2-0.5B"})


@oddity("qwen3", "huggingface/peft/issues/1381", "weights")
def adapter_without_its_settings_beside_the_merged_model(folder: Path) -> None:
    store(folder, {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 128)}, "adapter_model.safetensors")


@oddity("mistral", "sgl-project/sglang/pull/32279", "weights", REFUSED, names=["00002-of-00002"])
def one_of_the_shards_missing(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


@oddity("llama", "turboderp/exllama/issues/242", "tokenizer", REFUSED, names=[TOKENIZER])
def pointer_of_git_lfs_in_place_of_the_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9085657\n"
    )


@oddity("llama", "microsoft/BitNet/issues/608", "weights", REFUSED, names=[WEIGHTS])
def half_of_a_file(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


@oddity("qwen2-vl", "huggingface/transformers/issues/27923", "weights", REFUSED, names=[WEIGHTS])
def pointer_of_git_lfs(folder: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n"
    (folder / WEIGHTS).write_text(pointer)


@oddity("qwen3", "https://huggingface.co/docs/huggingface_hub/guides/manage-cache", "weights tokenizer")
def links_to_the_blobs_of_a_cache(folder: Path) -> None:
    blobs = folder / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        blob = shutil.move(path, blobs / f"{number:064x}")
        path.symlink_to(blob)


# config.json ---------------------------------------------------------------------------------------------------------


@oddity("qwen2-vl", "modelscope/ms-swift/issues/2340", "config")
def rope_scaling_with_type_and_rope_type_default(folder: Path) -> None:
    edit_text(
        folder,
        "rope_parameters",
        rope_theta=1e6,
        rope_scaling={"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
    )
    flatten(folder)


@oddity("qwen2-vl", "huggingface/transformers/issues/33401", "config")
def rope_scaling_of_type_mrope(folder: Path) -> None:
    rope = {"type": "mrope", "mrope_section": [4, 6, 6]}
    edit_text(folder, "rope_parameters", rope_theta=1e6, rope_scaling=rope)
    flatten(folder)


@oddity("qwen2-vl", "https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct/blob/main/config.json", "config weights")
def vision_settings_by_older_names(folder: Path) -> None:
    vision = read(folder, CONFIG)["vision_config"]
    vision = {key: value for key, value in vision.items() if key not in ("in_channels", "model_type")}
    edit(folder, CONFIG, vision_config=vision | {"in_chans": 3, "spatial_patch_size": 14})


@oddity("llama", "https://huggingface.co/huggyllama/llama-7b/blob/main/config.json", "config weights")
def number_of_key_value_heads_missing(folder: Path) -> None:
    def repeat(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor] * 8) if ".k_proj." in name or ".v_proj." in name else tensor

    store(folder, {name: repeat(name, tensor) for name, tensor in tensors(folder).items()})
    edit(folder, CONFIG, "num_key_value_heads")


@oddity("llama", "NVIDIA/TensorRT-LLM/pull/1385", "config")
def rope_scaling_of_type_linear(folder: Path) -> None:
    edit(folder, CONFIG, "rope_parameters", rope_theta=1e5, rope_scaling={"factor": 4.0, "type": "linear"})


@oddity("qwen2", "ModelTC/LightLLM/pull/344", "config")
def rope_scaling_null(folder: Path) -> None:
    edit(folder, CONFIG, "rope_parameters", rope_theta=1e6, rope_scaling=None)


@oddity("llama", "ShmuelRonen/ComfyUI_ChatterBox_Voice/issues/1", "config")
def rope_scaling_of_llama3(folder: Path) -> None:
    rope = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}
    edit(folder, CONFIG, "rope_parameters", rope_theta=5e5, rope_scaling=rope | {"rope_type": "llama3"})


@oddity("qwen2", "huggingface/transformers/issues/35896", "config")
def sliding_window_that_no_layer_has(folder: Path) -> None:
    edit(folder, CONFIG, "layer_types", use_sliding_window=True, sliding_window=64, max_window_layers=4)


@oddity("qwen3", "Blackwellboy/model-serving-minefield/issues/107", "config")
def sliding_window_without_its_switch(folder: Path) -> None:
    edit(folder, CONFIG, "layer_types", "use_sliding_window", sliding_window=16, max_window_layers=0)


@oddity(
    "mistral",
    "https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json",
    "config",
    EITHER,
    "MNN's engine has no sliding window",
    ["sliding_attention"],
)
def sliding_window_longer_than_any_prompt(folder: Path) -> None:
    edit(folder, CONFIG, sliding_window=4096)


@oddity("llama", "HabanaAI/vllm-fork/pull/1294", "config")
def head_dim_null(folder: Path) -> None:
    edit(folder, CONFIG, head_dim=None)


@oddity("qwen3", "marin-community/marin/issues/2098", "config", REFUSED, names=["head_dim", "q_proj", "k_norm"])
def head_dim_missing(folder: Path) -> None:
    edit(folder, CONFIG, "head_dim")


@oddity("qwen2.5-vl", "X-Square-Robot/wall-x/issues/7", "config weights stop")
def settings_of_the_decoder_at_the_top(folder: Path) -> None:
    flatten(folder)


@oddity("qwen2.5-vl", "sgl-project/sglang/issues/6848", "config weights")
def settings_of_the_decoder_at_the_top_and_nested(folder: Path) -> None:
    config = read(folder, CONFIG)
    write(folder, CONFIG, {**config["text_config"], **config})


@oddity("qwen2.5-vl", "huggingface/transformers/pull/43429", "config weights")
def tie_word_embeddings_only_in_text_config(folder: Path) -> None:
    edit(folder, CONFIG, "tie_word_embeddings")
    edit_text(folder, tie_word_embeddings=True)


@oddity("qwen3", "ai-dynamo/dynamo/pull/3043", "config", EITHER, "JSON has no such number (RFC 8259)", ["Infinity"])
def infinity_in_config(folder: Path) -> None:
    edit(folder, CONFIG, time_step_limit=[0.0, float("inf")])


@oddity("qwen2", "ThilinaRajapakse/simpletransformers/issues/1169", "config", REFUSED, names=[CONFIG])
def byte_order_mark_in_config(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())


@oddity("mistral", "instructlab/training/issues/128", "config weights")
def architectures_missing(folder: Path) -> None:
    edit(folder, CONFIG, "architectures")


@oddity("mistral", "vllm-project/vllm/issues/4989", "config weights")
def architecture_without_a_head(folder: Path) -> None:
    edit(folder, CONFIG, architectures=["MistralModel"])


@oddity("smollm3", "unslothai/unsloth-zoo/pull/286", "config weights")
def torch_dtype_in_place_of_dtype(folder: Path) -> None:
    edit(folder, CONFIG, "dtype", torch_dtype="bfloat16")


@oddity(
    "llama", "bitsandbytes-foundation/bitsandbytes/pull/753", "config", REFUSED, names=["quant_method", "bitsandbytes"]
)
def quantization_config_left_in_a_merged_model(folder: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit(folder, CONFIG, quantization_config=settings)


# Stop ids ------------------------------------------------------------------------------------------------------------


@oddity("qwen2", "huggingface/transformers/issues/29988", "stop")
def generation_config_with_temperature_and_without_sampling(folder: Path) -> None:
    edit(folder, GENERATION, do_sample=False, temperature=0.9, top_p=0.6)


@oddity("llama", "turboderp-org/exllamav2/pull/449", "stop")
def stop_ids_in_a_list(folder: Path) -> None:
    edit(folder, GENERATION, eos_token_id=[549, 551])


@oddity("qwen3", "QwenLM/Qwen3/issues/1422", "stop")
def stop_id_of_config_and_tokenizer_differ(folder: Path) -> None:
    edit(folder, GENERATION, eos_token_id=549)
    edit(folder, CONFIG, eos_token_id=549)


@oddity("qwen3-vl", "ai-dynamo/dynamo/pull/8091", "stop", EITHER, names=["eos_token_id"])
def stop_id_only_in_text_config(folder: Path) -> None:
    (folder / GENERATION).unlink()
    edit(folder, CONFIG, "eos_token_id")
    edit_text(folder, eos_token_id=549)


@oddity("llama", "unslothai/unsloth/issues/416", "stop")
def stop_ids_of_config_without_generation_config(folder: Path) -> None:
    (folder / GENERATION).unlink()
    edit(folder, CONFIG, eos_token_id=[551, 549])
    edit(folder, TOKENIZER_CONFIG, eos_token="<|im_start|>")


@oddity("qwen2", "pytorch/executorch/pull/15215", "stop tokenizer chat")
def eos_token_of_special_tokens_map_differs(folder: Path) -> None:
    edit(folder, TOKENIZER_CONFIG, "extra_special_tokens")
    write(folder, "special_tokens_map.json", {"eos_token": token("<|endoftext|>"), "pad_token": "<|endoftext|>"})
    write_template(folder, "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")


# Tokenizers ----------------------------------------------------------------------------------------------------------


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = read(folder, TOKENIZER)
    change(content)
    (folder / TOKENIZER).write_text(json.dumps(content, ensure_ascii=False))


def change_merges(folder: Path, form: Callable[[list[str]], Any]) -> None:
    def change(content: dict[str, Any]) -> None:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
        content["model"]["merges"] = [form(pair) for pair in pairs]

    change_tokenizer(folder, change)


@oddity("qwen2", "robertknight/rten/pull/392", "tokenizer")
def merges_as_pairs(folder: Path) -> None:
    change_merges(folder, list)


@oddity("llama", "microsoft/onnxruntime-extensions/pull/987", "tokenizer")
def merges_as_strings(folder: Path) -> None:
    change_merges(folder, " ".join)


@oddity("qwen2-vl", "huggingface/nanoVLM/issues/183", "tokenizer")
def extra_special_tokens_by_name(folder: Path) -> None:
    edit(folder, TOKENIZER_CONFIG, extra_special_tokens={"image_token": "<|image_pad|>", "r1c1": "<row_1_col_1>"})


@oddity("qwen3", "modelscope/ms-swift/issues/8186", "tokenizer")
def extra_special_tokens_in_a_list(folder: Path) -> None:
    old = read(folder, TOKENIZER_CONFIG)["extra_special_tokens"]
    edit(folder, TOKENIZER_CONFIG, extra_special_tokens=[*old, "<|new|>"])


@oddity("qwen2", "hiyouga/LlamaFactory/issues/8255", "tokenizer")
def additional_special_tokens(folder: Path) -> None:
    old = read(folder, TOKENIZER_CONFIG)["extra_special_tokens"]
    edit(folder, TOKENIZER_CONFIG, "extra_special_tokens", additional_special_tokens=[*old, "<|new|>"])


@oddity("qwen2", "huggingface/transformers/issues/48658", "tokenizer")
def special_flag_overridden(folder: Path) -> None:
    change_tokenizer(folder, lambda content: content["added_tokens"][3].update(special=False))


@oddity("qwen3", "Comfy-Org/ComfyUI/pull/15808", "tokenizer")
def added_tokens_decoder_with_other_flags(folder: Path) -> None:
    old = {str(entry["id"]): token(entry["content"]) for entry in read(folder, TOKENIZER)["added_tokens"]}
    new = {"562": token("<|video_pad|>", special=False), str(NEXT_ID): token("<d>", special=False, lstrip=True)}
    edit(folder, TOKENIZER_CONFIG, "extra_special_tokens", added_tokens_decoder=old | new)


@oddity("llama", "huggingface/transformers/issues/27132", "tokenizer")
def added_tokens_of_a_slow_tokenizer(folder: Path) -> None:
    write(folder, "added_tokens.json", {"<|new|>": NEXT_ID, "<|newer|>": NEXT_ID + 1})


@oddity("mistral", "ggml-org/llama.cpp/pull/3585", "tokenizer")
def added_tokens_that_the_vocabulary_has(folder: Path) -> None:
    write(folder, "added_tokens.json", {"<|im_start|>": 550, "<|im_end|>": 551})


@oddity("llama", "ggml-org/llama.cpp/issues/3604", "tokenizer")
def runs_of_spaces_as_added_tokens(folder: Path) -> None:
    spaces = [token(" " * (8 - i), NEXT_ID + i, normalized=True, special=False) for i in range(4)]
    change_tokenizer(folder, lambda content: content["added_tokens"].extend(spaces))


@oddity("qwen2", "nghuyong/ERNIE-Pytorch/issues/72", "tokenizer", EITHER, names=[TOKENIZER])
def hole_in_the_vocabulary(folder: Path) -> None:
    change_tokenizer(folder, lambda content: content["added_tokens"].append(token("<|new|>", NEXT_ID + 1)))


@oddity("qwen3", "huggingface/transformers/pull/48446", "tokenizer", EITHER, names=[TOKENIZER, TOKENIZER_CONFIG])
def added_token_beyond_a_gap(folder: Path) -> None:
    old = {str(entry["id"]): token(entry["content"]) for entry in read(folder, TOKENIZER)["added_tokens"]}
    edit(folder, TOKENIZER_CONFIG, added_tokens_decoder=old | {"600": token("[PAD]")})


@oddity(
    "smollm3",
    "allenai/open-instruct/issues/95",
    "tokenizer",
    REFUSED,
    "the embedding has no row for the token",
    ["<pad>", "vocab"],
)
def pad_token_without_a_row_of_the_embedding(folder: Path) -> None:
    content = tensors(folder)
    name = embedding_name(content)
    store(folder, content | {name: content[name][:NEXT_ID].clone()})
    edit(folder, CONFIG, vocab_size=NEXT_ID)
    edit(folder, TOKENIZER_CONFIG, pad_token="<pad>")


@oddity("smollm3", "ggml-org/llama.cpp/pull/7033", "tokenizer")
def digits_split_before_bytes(folder: Path) -> None:
    parts = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
    sequence = {"type": "Sequence", "pretokenizers": parts}
    change_tokenizer(folder, lambda content: content.update(pre_tokenizer=sequence, normalizer=None))


@oddity("llama", "https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/tokenizer.json", "tokenizer")
def numbers_split_by_three_digits(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        split["Regex"] = split["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
        content["post_processor"] = {"type": "Sequence", "processors": [byte_level, content["post_processor"]]}
        content["model"]["ignore_merges"] = True
        content["normalizer"] = None

    change_tokenizer(folder, change)


@oddity("qwen2", "axolotl-ai-cloud/axolotl/issues/1322", "tokenizer")
def normalizer_missing(folder: Path) -> None:
    change_tokenizer(folder, lambda content: content.pop("normalizer"))


@oddity("qwen2", "huggingface/transformers/pull/28436", "tokenizer")
def class_qwen2_over_a_tokenizer_without_normalizer(folder: Path) -> None:
    change_tokenizer(folder, lambda content: content.update(normalizer=None))
    edit(folder, TOKENIZER_CONFIG, tokenizer_class="Qwen2Tokenizer")


@oddity("llama", "huggingface/transformers/issues/45488", "tokenizer")
def class_llama_over_bytes(folder: Path) -> None:
    edit(folder, TOKENIZER_CONFIG, tokenizer_class="LlamaTokenizerFast", legacy=True)


@oddity("qwen2", "huggingface/transformers/pull/48211", "tokenizer")
def class_llama_over_bytes_of_qwen2(folder: Path) -> None:
    edit(folder, TOKENIZER_CONFIG, tokenizer_class="LlamaTokenizer", add_bos_token=True)


@oddity("mistral", "huggingface/transformers/pull/46580", "tokenizer")
def class_llama_over_bytes_of_mistral(folder: Path) -> None:
    edit(folder, TOKENIZER_CONFIG, tokenizer_class="LlamaTokenizerFast")


@oddity("llama", "huggingface/transformers/issues/30947", "tokenizer")
def bos_and_eos_switched_on(folder: Path) -> None:
    edit(folder, TOKENIZER_CONFIG, bos_token="<|endoftext|>", add_bos_token=True, add_eos_token=True)


@oddity("qwen2", "OpenRLHF/OpenRLHF/issues/1069", "tokenizer", EITHER, "", [TOKENIZER, TOKENIZER_CONFIG, "prefix"])
def add_prefix_space_over_bytes(folder: Path) -> None:
    edit(folder, TOKENIZER_CONFIG, tokenizer_class="Qwen2Tokenizer", add_prefix_space=True)


@oddity(
    "qwen2",
    "huggingface/transformers/issues/31337",
    "tokenizer",
    EITHER,
    "the engine finds special tokens in every text",
    ["split_special_tokens"],
)
def split_special_tokens(folder: Path) -> None:
    edit(folder, TOKENIZER_CONFIG, split_special_tokens=True)


@oddity("qwen2", "ggml-org/llama.cpp/issues/3732", "tokenizer", EITHER, "MNN's file has one source", [TOKENIZER])
def vocabulary_and_merges_without_tokenizer_json(folder: Path) -> None:
    content = read(folder, TOKENIZER)
    added = {str(entry["id"]): token(entry["content"]) for entry in content["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    write(folder, "vocab.json", content["model"]["vocab"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / TOKENIZER).unlink()
    edit(folder, TOKENIZER_CONFIG, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=added)


def write_meta_space_tokenizer(folder: Path, normalizer: Any, splitter: Any, **settings: Any) -> None:
    """Replace the tokenizer by one of Llama 2: characters with meta spaces, and bytes for all others."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyzHW0123456789,.!?"]
    merges = [("\u2581", letter) for letter in letters[1:]] + [("h", "e"), ("l", "l"), ("\u2581h", "e")]
    merges += [("\u2581", "\u2581"), ("o", "r"), ("\u2581w", "or"), ("\u2581W", "or")]
    pieces += letters + ["".join(merge) for merge in merges]
    pieces = list(dict.fromkeys(pieces))
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token(pieces[number], number) for number in range(3)],
        "normalizer": normalizer,
        "pre_tokenizer": splitter,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": [list(merge) for merge in merges],
        },
    }
    Tokenizer.from_str(json.dumps(content))
    write(folder, TOKENIZER, content)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder, TOKENIZER_CONFIG, {"tokenizer_class": "LlamaTokenizer", **tokens, **settings})
    edit(folder, GENERATION, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    edit(folder, CONFIG, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    write_template(folder, "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}")


PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}


def meta_spaces(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}


@oddity("llama", "huggingface/transformers/pull/28010", "tokenizer chat")
def llama_tokenizer_with_legacy(folder: Path) -> None:
    write_meta_space_tokenizer(folder, PREPEND, None, legacy=True)


@oddity("llama", "huggingface/transformers/pull/30964", "tokenizer chat")
def llama_tokenizer_without_legacy(folder: Path) -> None:
    write_meta_space_tokenizer(folder, PREPEND, None, legacy=False)


@oddity("llama", "huggingface/transformers/issues/29625", "tokenizer")
def llama_tokenizer_without_prefix_space(folder: Path) -> None:
    write_meta_space_tokenizer(folder, PREPEND, None, legacy=True, add_prefix_space=False)


@oddity("llama", "huggingface/transformers.js/issues/1612", "tokenizer")
def llama_tokenizer_whose_file_has_no_prefix_space(folder: Path) -> None:
    write_meta_space_tokenizer(folder, None, meta_spaces("never"), legacy=False, add_prefix_space=False)


@oddity("mistral", "huggingface/transformers/issues/28622", "tokenizer")
def llama_tokenizer_of_mistral(folder: Path) -> None:
    write_meta_space_tokenizer(folder, None, meta_spaces("first"), legacy=False)


# Chat templates ------------------------------------------------------------------------------------------------------


def write_template(folder: Path, template: str) -> None:
    (folder / TEMPLATE).write_text(template)


def take_template(folder: Path) -> str:
    """Remove the chat template, and return it."""
    template = (folder / TEMPLATE).read_text()
    (folder / TEMPLATE).unlink()
    return template


@oddity("llama", "ollama/ollama/pull/6522", "chat")
def list_of_templates(folder: Path) -> None:
    named = {"default": take_template(folder), "tool_use": "{{ tools }}"}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    edit(folder, TOKENIZER_CONFIG, chat_template=listed[::-1])


@oddity("mistral", "huggingface/swift-transformers/pull/134", "chat", REFUSED, names=["template"])
def list_of_templates_without_a_default(folder: Path) -> None:
    listed = [{"name": name, "template": take_template(folder)} for name in ("tool_use",)]
    edit(folder, TOKENIZER_CONFIG, chat_template=[*listed, {"name": "rag", "template": "{{ documents }}"}])


@oddity("qwen3", "GraySwanAI/nanoGCG/pull/17", "chat", REFUSED, names=["template"])
def template_missing(folder: Path) -> None:
    take_template(folder)


@oddity("smollm3", "huggingface/transformers/pull/36588", "chat")
def additional_templates_in_a_folder(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")


@oddity("qwen3", "huggingface/transformers/pull/33957", "chat")
def template_file_and_another_in_tokenizer_config(folder: Path) -> None:
    edit(folder, TOKENIZER_CONFIG, chat_template="{{ messages[0]['content'] }}")


@oddity("qwen2-vl", "huggingface/transformers/pull/45851", "chat")
def template_in_a_json_file_and_another_in_a_file(folder: Path) -> None:
    template = (folder / TEMPLATE).read_text()
    write(folder, LEGACY_TEMPLATE, {"chat_template": template.replace("helpful", "trained")})


@oddity("qwen2.5-vl", "huggingface/transformers/pull/31691", "chat")
def template_in_processor_config(folder: Path) -> None:
    template = (folder / TEMPLATE).read_text()
    write(folder, PROCESSOR, {"chat_template": template.replace("helpful", "trained")})


@oddity("qwen2", "PaddlePaddle/PaddleNLP/pull/8101", "chat")
def template_in_a_json_file_of_a_text_model(folder: Path) -> None:
    write(folder, LEGACY_TEMPLATE, {"chat_template": "{{ messages[0]['content'] }}"})
    edit(folder, TOKENIZER_CONFIG, chat_template=take_template(folder))


@oddity("qwen3", "kekzl/imp/pull/828", "chat")
def template_file_with_a_newline_at_its_end(folder: Path) -> None:
    template = "{%- for m in messages %}\n{{- m['content'] + '\\n' }}\n{%- endfor %}\nassistant\n"
    (folder / TEMPLATE).write_bytes(template.encode())


@oddity("qwen2", "huggingface/transformers/issues/34462", "chat")
def template_with_carriage_returns_and_newlines_at_its_end(folder: Path) -> None:
    take_template(folder)
    template = "{% for m in messages %}\r\n{{ m['content'] }}\r\n{% endfor %}assistant\r\n\r\n"
    edit(folder, TOKENIZER_CONFIG, chat_template=template)


@oddity("llama", "meta-llama/llama3/issues/104", "chat")
def template_with_bos_token_that_is_null(folder: Path) -> None:
    write_template(folder, "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}{{ eos_token }}{% endfor %}")
    edit(folder, TOKENIZER_CONFIG, bos_token=None)


@oddity("llama", "ggml-org/llama.cpp/issues/5040", "chat stop")
def eos_token_as_an_object(folder: Path) -> None:
    write_template(folder, "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    edit(folder, TOKENIZER_CONFIG, eos_token={"__type": "AddedToken", **token("<|im_end|>")})


# Images --------------------------------------------------------------------------------------------------------------


@oddity("qwen2.5-vl", "QwenLM/Qwen3-VL/issues/777", "images", REFUSED, names=["image_processor_type", IMAGES])
def image_processor_of_qwen2_5_vl(folder: Path) -> None:
    edit(folder, IMAGES, "size", image_processor_type="Qwen2_5_VLImageProcessor", min_pixels=3136, max_pixels=25088)


@oddity("qwen2-vl", "huggingface/transformers/pull/36164", "images")
def fast_image_processor(folder: Path) -> None:
    edit(folder, IMAGES, image_processor_type="Qwen2VLImageProcessorFast")


@oddity("qwen2-vl", "QwenLM/Qwen3-VL/issues/1052", "images")
def pixel_limits_that_differ_from_size(folder: Path) -> None:
    edit(folder, IMAGES, min_pixels=6272, max_pixels=25088)


@oddity("qwen2-vl", "ertugrul-dmr/qwen2vl-captioner-gui/issues/2", "images")
def size_with_the_names_of_pixel_limits(folder: Path) -> None:
    edit(folder, IMAGES, size={"min_pixels": 3136, "max_pixels": 25088}, min_pixels=3136, max_pixels=25088)


@oddity("qwen2.5-vl", "unslothai/unsloth/issues/1747", "images", REFUSED, names=[IMAGES, "size", "min_pixels"])
def size_with_one_limit(folder: Path) -> None:
    edit(folder, IMAGES, size={"longest_edge": 25088})


@oddity("qwen2-vl", "QwenLM/Qwen3-VL/issues/272", "images")
def pixel_limits_missing(folder: Path) -> None:
    edit(folder, IMAGES, "size", "min_pixels", "max_pixels")


@oddity("qwen2-vl", "deepseek-ai/Janus/issues/24", "images", EITHER, "the engine normalizes", ["do_normalize"])
def normalization_off(folder: Path) -> None:
    edit(folder, IMAGES, do_normalize=False)


@oddity("qwen3-vl", "vllm-project/vllm-ascend/issues/491", "images", EITHER, "the engine rescales", ["do_rescale"])
def rescaling_off(folder: Path) -> None:
    edit(folder, IMAGES, do_rescale=False)


@oddity("qwen2-vl", "huggingface/transformers/issues/20867", "images", EITHER, "", ["rescale_factor"])
def another_rescale_factor(folder: Path) -> None:
    edit(folder, IMAGES, rescale_factor=1 / 127.5)


@oddity("qwen2.5-vl", "apple/coreai-models/issues/82", "images")
def statistics_left_to_the_defaults(folder: Path) -> None:
    edit(folder, IMAGES, "image_mean", "image_std")


@oddity("qwen3-vl", "huggingface/transformers/pull/44652", "images")
def image_processor_in_processor_config(folder: Path) -> None:
    settings = read(folder, IMAGES) | {"size": {"shortest_edge": 4096, "longest_edge": 32768}}
    (folder / IMAGES).unlink()
    write(folder, PROCESSOR, {"image_processor": settings, "processor_class": "Qwen3VLProcessor"})


@oddity("qwen2.5-vl", "huggingface/transformers/pull/41633", "images")
def image_processor_in_two_files(folder: Path) -> None:
    settings = read(folder, IMAGES) | {"size": {"shortest_edge": 3136, "longest_edge": 25088}}
    write(folder, PROCESSOR, {"image_processor": settings, "processor_class": "Qwen2_5_VLProcessor"})


@oddity("qwen2-vl", "vllm-project/llm-compressor/issues/1305", "images", REFUSED, names=[IMAGES, PROCESSOR])
def image_processor_missing(folder: Path) -> None:
    (folder / IMAGES).unlink()


PROCESSOR_DOCS = "https://huggingface.co/docs/transformers/model_doc/qwen2_vl#transformers.Qwen2VLImageProcessor"


@oddity("qwen2-vl", PROCESSOR_DOCS, "images", EITHER, "the bundle's images are resized bicubically", ["resample"])
def another_filter_for_resizing(folder: Path) -> None:
    edit(folder, IMAGES, resample=2)


@oddity("qwen2.5-vl", PROCESSOR_DOCS, "images", REFUSED, names=["do_resize"])
def resizing_off(folder: Path) -> None:
    edit(folder, IMAGES, do_resize=False)
