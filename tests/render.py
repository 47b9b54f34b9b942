"""A task for a child process with MNN's engine: what it makes of chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import MNN.llm

from hf2mnn.mnn.template import render


def run(job: dict[str, Any]) -> None:
    """[engine's, Jinja's] rendering of job["chat"] by each of job["templates"], into job["result"] (JSON). The bundle
    needs no model.
    """
    engine, rendered = MNN.llm.create(job["config"]), []
    engine._c_obj.load()
    for template in job["templates"]:
        engine.set_config({"jinja": {"chat_template": template, "eos": "<E>"}})
        made = engine._c_obj.apply_chat_template(job["chat"])
        rendered.append([made, render(template, job["chat"], {"eos_token": "<E>"})])
    Path(job["result"]).write_text(json.dumps(rendered))
