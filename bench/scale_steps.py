"""Steps of hf2mnn and of MNN's llmexport from a checkpoint to bundles, as commands."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.fingerprint import fingerprint
from hf2mnn.stages import stage_named

HF2MNN, LLMEXPORT = "hf2mnn", "llmexport"
MATCHED, INT4, INT8 = "int4 rtn", "int4", "int8"
VARIANTS = (MATCHED, INT4, INT8)
STEPS = ("fetch", "export", "convert")
"""Steps that all variants share; `quantize` follows for each."""

LLM_BITS, LLM_BLOCK, LLM_VISION_BLOCK = 4, 64, 128
"""Defaults of llmexport 0.0.5; the last is `Vision.quant_block` of its utils/vision.py."""
LLM_FILES = ("config.json", "llm.mnn", "llm.mnn.weight", "llm_config.json", "tokenizer.mtok", "visual.mnn")
VERSIONS = """
import json
from importlib.metadata import version
from importlib.util import find_spec
versions = {name: version(name) for name in ("llmexport", "transformers", "torch", "MNN")}
print(json.dumps({"folder": find_spec("llmexport").submodule_search_locations[0], "versions": versions}))
"""
CONVERT = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
"""MNN's converter without the program `mnnconvert`, which installs packages and reports usage."""


@dataclass(frozen=True)
class Step:
    """A step of a tool.

    Attributes:
        tool: Name of the tool.
        name: Name of the step.
        command: Command that writes `folder`.
        folder: Output folder.
        code: Identifies the code and settings that the result depends on.
    """

    tool: str
    name: str
    command: tuple[str | Path, ...]
    folder: Path
    code: str


def read_config(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text())


def checkpoint_size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def quantize_options(config: dict[str, Any]) -> dict[str, list[str]]:
    """Return the options of `hf2mnn quantize` for each variant."""
    width = config["vision_config"]["embed_dim"]
    block = next(block for block in (LLM_VISION_BLOCK, 64, 32, 16, 0) if not block or width % block == 0)
    nearest = {"bits": LLM_BITS, "block": LLM_BLOCK, "method": "rtn"}
    matched = ["--decoder", json.dumps(nearest), "--vision", json.dumps({**nearest, "block": block})]
    tied = ["--embedding", "lm_head"] if config.get("tie_word_embeddings") else []
    return {
        MATCHED: [*matched, *tied],
        INT4: ["--decoder", json.dumps({"bits": 4, "block": 64})],
        INT8: ["--decoder", json.dumps({"bits": 8})],
    }


def hf2mnn_steps(checkpoint: Path, root: Path, variants: Sequence[str], threads: int) -> list[Step]:
    """Return the steps of hf2mnn, whose folders are below `root`."""
    program, options = Path(sys.executable).parent / "hf2mnn", quantize_options(read_config(checkpoint))
    fetched, onnx, graphs = (root / name for name in ("checkpoint", "onnx", "graphs"))
    stages = [
        ("fetch", "fetch", ["--path", checkpoint], fetched),
        ("export", "export", [fetched], onnx),
        ("convert", "convert", [onnx], graphs),
    ]
    for variant in variants:
        arguments = [onnx, graphs, *options[variant], "--threads", str(threads)]
        stages.append((f"quantize {variant}", "quantize", arguments, root / variant.replace(" ", "-")))
    earlier, steps = "", []
    for name, stage, arguments, folder in stages:
        code = fingerprint(stage_named(stage))
        digest = hashlib.sha256(f"{earlier}{code}{arguments[2:]}".encode()).hexdigest()[:16]
        steps.append(Step(HF2MNN, name, (program, stage, *arguments, "--out", folder), folder, digest))
        # A result depends on the code of the earlier steps too, but a bundle does not depend on other bundles.
        earlier += code if stage != "quantize" else ""
    return steps


def flat_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint for llmexport 0.0.5 with transformers 4.57.6: links to its files, and settings as published.

    The settings are in the form of transformers 4, in which Qwen has published its models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        if path.suffix in (".safetensors", ".json", ".jinja") and path.name != "manifest.json":
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path.resolve())
    config = read_config(checkpoint)
    if text := config.pop("text_config", None):
        # llmexport expects the decoder's settings (hidden_size, ...) at the top level.
        vision, rope = config["vision_config"], text.pop("rope_parameters")
        # transformers 4 has two keys for rotary positions, and none in the vision tower.
        text |= {"rope_theta": rope["rope_theta"]}
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        vision.pop("rope_parameters", None)
        # "model_type" of the decoder would replace the model's; the others have other names or are derived.
        for name in ("model_type", "layer_types", "dtype"):
            text.pop(name, None)
        vision.pop("dtype", None)
        config["torch_dtype"] = config.pop("dtype", "bfloat16")
        config = {**text, **config}
        # transformers 5 omits defaults.
        config.setdefault("vision_start_token_id", 151652)
        _write_in_place(folder / "config.json", config)
    tokenizer_config = checkpoint / "tokenizer_config.json"
    if tokenizer_config.is_file():
        tokenizer = json.loads(tokenizer_config.read_text())
        if isinstance(special := tokenizer.get("extra_special_tokens"), list):
            # transformers 4 has another name for the list.
            tokenizer["additional_special_tokens"] = special
            del tokenizer["extra_special_tokens"]
        if tokenizer.pop("backend", None):
            # The class of transformers 5 does not exist in transformers 4.
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        if (template := checkpoint / "chat_template.jinja").is_file():
            # llmexport reads the template only from here.
            tokenizer["chat_template"] = template.read_text()
        _write_in_place(folder / tokenizer_config.name, tokenizer)
    return folder


def _write_in_place(path: Path, content: dict[str, Any]) -> None:
    """Replace a link by a file; its target does not change."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def describe_llmexport(python: Path) -> dict[str, Any]:
    """Return `folder`, where llmexport is installed, and `versions` of it and its libraries.

    Raises:
        Hf2mnnError: The interpreter has no llmexport.
    """
    done = None
    with suppress(OSError):
        done = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True)
    if done is None or done.returncode != 0:
        raise Hf2mnnError(
            f"{python} has no llmexport: run 'make bench', which installs bench/llmexport.txt, give"
            " --llmexport-python, or leave it out with --only hf2mnn"
        )
    return json.loads(done.stdout)


def llmexport_steps(checkpoint: Path, root: Path, python: Path, description: dict[str, Any]) -> list[Step]:
    """Return the one step of llmexport.

    Raises:
        Hf2mnnError: `root` contains white space, which llmexport passes to a shell unquoted.
    """
    bundle, converter = root / "bundle", root / "convert"
    if re.search(r"\s", str(root)):
        raise Hf2mnnError(f"llmexport needs a folder without spaces in its path, not {root}: give another --work")
    flat = flat_checkpoint(checkpoint, root / "checkpoint")
    converter.write_text(f'#!/bin/sh\nexec {python} -c "{CONVERT}" "$@"\n')
    converter.chmod(0o755)
    command = [python, Path(description["folder"]) / "llmexport.py", "--path", flat, "--export", "mnn"]
    command += ["--dst_path", bundle, "--type", read_config(checkpoint)["model_type"], "--mnnconvert", converter]
    command += ["--quant_bit", str(LLM_BITS), "--quant_block", str(LLM_BLOCK)]
    return [Step(LLMEXPORT, "total", tuple(command), bundle, json.dumps(description["versions"], sort_keys=True))]
