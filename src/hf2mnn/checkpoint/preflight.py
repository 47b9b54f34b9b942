"""What headers and JSON tell of a checkpoint before anything heavy is done: a fault found hours later costs hours.

No weight is read, but the small tensors of packed layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf2mnn.checkpoint.facts import COUNTS, model_facts
from hf2mnn.checkpoint.folder import LFS_POINTER, Checkpoint, checkpoint_files, read_json
from hf2mnn.checkpoint.prequantized import PACKED, WEIGHT
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.untrusted import inside
from hf2mnn.families.vision import BUILT_IN, VisionFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

INDEX = "model.safetensors.index.json"


CODE = "auto_map"
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Keys of config.json by which transformers loads compiled code of a hub's repository, if they name one."""


def check_links(checkpoint: Checkpoint) -> None:
    """A repository may bring links, and what they lead to would be read and become part of bundles."""
    for path in map(Path, checkpoint_files(checkpoint.folder)):
        try:
            inside(checkpoint.folder, path.name)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.folder} is not read: {error}; put the file itself there") from None
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a file; put the checkpoint's own there")


def _settings(value: Any) -> Iterator[dict[str, Any]]:
    """A JSON object and those within it."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _settings(part)


def check_code(checkpoint: Checkpoint) -> None:
    """Nothing of the checkpoint asks for code of a stranger's. It would not run, and without it the model is another
    than its owner means.
    """
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        path = checkpoint.folder / name
        for settings in _settings(read_json(path)) if path.exists() else ():
            if settings.get(CODE):
                raise CheckpointError(
                    f"{path} asks for code of its own ({CODE}: {settings[CODE]!r}), which is never run; if the classes"
                    f" of transformers compute the same, take {CODE} out of the file"
                )
            for key in KERNELS:
                if "/" in str(settings.get(key)):
                    raise CheckpointError(
                        f"{path} asks for compiled code of a hub ({key}: {settings[key]!r}), which is never run; take"
                        f" {key} out of the file"
                    )


def check_depth(checkpoint: Checkpoint) -> None:
    """No architecture is built that is larger than the weights there are."""
    facts = model_facts(checkpoint)
    for key in ("num_hidden_layers", "vision_depth"):
        if facts.get(key, 0) > len(checkpoint.shards):
            raise CheckpointError(
                f"config.json of {checkpoint.folder} asks for {facts[key]} layers, and its safetensors hold"
                f" {len(checkpoint.shards)} tensors: config and weights are not of one model"
            )


def check_images(checkpoint: Checkpoint) -> None:
    """Images are cut as the engine cuts them: nothing can tell it to cut them otherwise."""
    family = checkpoint.family
    if not isinstance(family, VisionFamily):
        return
    facts, vision = model_facts(checkpoint), checkpoint.config["vision_config"]
    there = {
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "merge_size": "spatial_merge_size",
    }
    for key, value in {**BUILT_IN, "patch_size": family.patch_size}.items():
        if facts[key] != value:
            raise CheckpointError(
                f"{checkpoint.folder} has a {key} of {facts[key]}; {value} is built into MNN's engine for"
                f" {family.model_type}, so it cannot run this vision tower"
            )
        if vision.get(there[key], value) != value:
            raise CheckpointError(
                f"config.json of {checkpoint.folder} says {there[key]} {vision[there[key]]!r}, its"
                f" preprocessor_config.json {key} {value}: they are not of one model"
            )


def check_pointers(checkpoint: Checkpoint) -> None:
    """A clone without LFS has small texts in place of weights and of a large tokenizer.json."""
    for path in map(Path, checkpoint_files(checkpoint.folder)):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                what = "the weights" if path.suffix == ".safetensors" else "the file itself"
                raise CheckpointError(f"{path} is a Git LFS pointer, not {what}; run 'git lfs pull' in its folder")


def check_index(checkpoint: Checkpoint) -> None:
    """The index and the shards must name the same tensors in the same places."""
    path = checkpoint.folder / INDEX
    if not path.exists():
        return
    there, index = checkpoint.shards, read_json(path)["weight_map"]  # which `shards` has looked at
    for name, file in sorted(index.items()):
        if name not in there:
            raise CheckpointError(f"{path} names {name} in {file}, which does not hold it: they are not of one model")
        if there[name].name != file:
            raise CheckpointError(
                f"{path} names {name} in {file}, but {there[name].name} holds it; download both again"
            )
    if rest := there.keys() - index.keys():
        name = min(rest)
        raise CheckpointError(f"{there[name]} holds {name}, which {path} does not name: they are not of one model")


def check_defaults(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """What config.json leaves out is what transformers takes for it; `config` is what that has made of the file."""
    text, facts = config.get_text_config(), model_facts(checkpoint)
    taken = {key: getattr(text, key, None) for key in COUNTS}
    taken["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    for key, value in taken.items():
        if value is not None and value != facts[key]:
            raise CheckpointError(
                f"config.json of {checkpoint.folder} does not say what its {key} is: transformers takes it for {value},"
                f" and {facts[key]} is the usual; write it there"
            )
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise CheckpointError(
            f"config.json of {checkpoint.folder} leaves layer_types out, and transformers makes some layers"
            f" {min(kinds)}, which is not converted"
        )


def check_weights(checkpoint: Checkpoint) -> None:
    """Every parameter of the architecture is there in its shape, and no weight that it has no place for."""
    # Loaded here: they take seconds, and most faults are found without them.
    from hf2mnn.reference.model import outline

    model = outline(checkpoint)
    check_defaults(checkpoint, model.config)
    parameters = model.state_dict()
    for parameter, value in parameters.items():
        checkpoint.check_shape(parameter, value.shape)
    used = {checkpoint.find(parameter) for parameter in parameters}
    # Biases that GPTQ writes for every layer, tables of rotary positions, and a tied lm_head are no other model's.
    for name in sorted(checkpoint.shards.keys() - used):
        if name.endswith((WEIGHT, PACKED)) and name != "lm_head.weight":
            raise CheckpointError(
                f"{checkpoint.folder} holds {name}, which a model of its config.json has no place for: config and"
                " weights are not of one model"
            )


def tokens_of(stored: dict[str, Any]) -> dict[int, str]:
    """Id to text of every token of a tokenizer.json.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is not laid out as one.
    """
    vocabulary = stored["model"]["vocab"]
    if isinstance(vocabulary, dict):
        tokens = {int(number): text for text, number in vocabulary.items()}
    else:
        tokens = {number: entry[0] for number, entry in enumerate(vocabulary)}
    return tokens | {int(token["id"]): token["content"] for token in stored.get("added_tokens") or []}


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """The tokenizer's ids are rows of the embedding, and the ids that config.json names are the tokens that they are
    taken for. A tokenizer smaller than the vocabulary is usual: rows are padded.
    """
    path = checkpoint.folder / "tokenizer.json"
    try:
        tokens = tokens_of(read_json(path))
        largest = max(tokens)
        if not all(isinstance(text, str) for text in tokens.values()):
            raise TypeError("tokens that are no text")
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is not a tokenizer ({type(error).__name__}: {error}); download it again"
        ) from None
    rows = model_facts(checkpoint)["vocab_size"]
    if largest >= rows:
        raise CheckpointError(
            f"{path} has a token {tokens[largest]!r} with id {largest}, but the model's vocabulary has {rows}:"
            " tokenizer and config.json are not of one model"
        )
    for key, text in checkpoint.family.special_tokens.items():
        number = checkpoint.config[key]
        if tokens.get(number) != text:
            what = repr(tokens[number]) if number in tokens else "no token"
            raise CheckpointError(
                f"config.json of {checkpoint.folder} says {key} {number}, which is {what} in tokenizer.json and should"
                f" be {text!r}: they are not of one model"
            )
    for number in checkpoint.stop_ids:
        if number not in tokens:
            raise CheckpointError(
                f"{checkpoint.folder} ends answers with token {number} (eos_token_id), which tokenizer.json does not"
                " have: they are not of one model"
            )


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Everything that can be seen without reading weights.

    Raises:
        CheckpointError: for the first thing that is missing, not whole, or does not fit the rest.
    """
    check_links(checkpoint)
    check_pointers(checkpoint)
    checkpoint.check()
    check_code(checkpoint)
    check_depth(checkpoint)
    check_images(checkpoint)
    check_index(checkpoint)
    check_tokenizer(checkpoint)
    check_weights(checkpoint)
