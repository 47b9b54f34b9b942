"""MNN's engine as a tokenizer, without a model.

Its load fails at the empty model file, after the tokenizer is loaded. It runs in a child process, because it crashes
rather than raises.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from hf2mnn.mnn.tokenizer import write_tokenizer

ENGINE = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the engine prints to standard output
import MNN.llm
engine = MNN.llm.create("config.json")
engine._c_obj.load()
for line in sys.stdin:
    method, arguments = json.loads(line)
    print(json.dumps([getattr(engine, method)(argument) for argument in arguments]), file=answers, flush=True)
"""


class Engine:
    """MNN's engine with a tokenizer and no model, in a child process that ends with the context."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        folder.mkdir()
        write_tokenizer(checkpoint, folder / "tokenizer.mtok")
        (folder / "config.json").write_text('{"tokenizer_file": "tokenizer.mtok"}')
        (folder / "llm_config.json").write_text('{"hidden_size": 8, "layer_nums": 1}')
        (folder / "llm.mnn").touch()
        (folder / "llm.mnn.weight").touch()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENGINE],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, method: str, arguments: list[Any]) -> list[Any]:
        assert self.process.stdin and self.process.stdout
        watchdog = threading.Timer(30, self.process.kill)
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps([method, arguments]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        assert answer, f"the engine died in {method} with code {self.process.wait(5)}"
        return json.loads(answer)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
