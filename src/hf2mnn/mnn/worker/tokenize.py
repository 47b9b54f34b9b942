"""Token ids of texts, by the engine with a tokenizer file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import MNN.llm


def run(job: dict[str, Any]) -> None:
    """Write the ids of job["texts"], a list of lists, to job["result"] (JSON); job["tokenizer"] is the file.

    The engine loads the tokenizer first, then fails at a model that is empty. Its paths are relative to config.json.
    """
    Path("tokenizer.mtok").symlink_to(job["tokenizer"])
    files = {"llm_model": "llm.mnn", "llm_weight": "llm.mnn.weight", "llm_config": "llm_config.json"}
    for name in files.values():
        Path(name).touch()
    Path(files["llm_config"]).write_text("{}")
    Path("config.json").write_text(json.dumps({**files, "tokenizer_file": "tokenizer.mtok"}))
    engine = MNN.llm.create("config.json")
    engine._c_obj.load()
    ids = [[int(number) for number in engine.tokenizer_encode(text)] for text in job["texts"]]
    Path(job["result"]).write_text(json.dumps(ids))
