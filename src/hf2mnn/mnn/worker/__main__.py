"""Run one task: python -m hf2mnn.mnn.worker MODULE JOB STATUS PARENT.

MODULE is the task, JOB its arguments (JSON), STATUS the status file to write, PARENT the process id of the caller.
"""

import importlib
import json
import os
import sys
from pathlib import Path

from hf2mnn.core.errors import BundleFault
from hf2mnn.core.machine_errors import machine_message
from hf2mnn.machine.child import die_with_parent

task, job_file, status_file, parent = sys.argv[1:]
die_with_parent(int(parent))
job, kind, message, fault = json.loads(Path(job_file).read_text()), "ok", "", ""
try:
    importlib.import_module(task).run(job)
except BundleFault as error:
    kind, message, fault = "bundle_fault", error.args[0], error.kind
except Exception as error:
    # Uncaught, it would run the engine's destructors, whose crash hides the error.
    kind, message = "machine", machine_message(error, Path(job.get("result", "")))
    if message is None:
        sys.excepthook(*sys.exc_info())
        kind, message = "bug", repr(error)
Path(status_file).write_text(json.dumps({"kind": kind, "message": message, "fault": fault}))
sys.stdout.flush()
sys.stderr.flush()
# The engine's destructors end in a segmentation fault.
os._exit(kind != "ok")
