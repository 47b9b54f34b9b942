"""Engine task: rendering of chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import MNN.llm

from hf2mnn.mnn.template import render


def run(job: dict[str, Any]) -> None:
    """Write [engine's, Jinja's] rendering of job["chat"] by each of job["templates"] to job["result"] (JSON).

    The bundle needs no model.
    """
    engine, rendered = MNN.llm.create(job["config"]), []
    engine._c_obj.load()
    for template in job["templates"]:
        engine.set_config({"jinja": {"chat_template": template, "eos": "<E>"}})
        text = engine._c_obj.apply_chat_template(job["chat"])
        rendered.append([text, render(template, job["chat"], {"eos_token": "<E>"})])
    Path(job["result"]).write_text(json.dumps(rendered))
