"""python -m hf2mnn.mnn.worker MODULE job.json PARENT"""

import importlib
import json
import os
import sys
from pathlib import Path

from hf2mnn.core.shortage import sentence
from hf2mnn.machine.child import end_with
from hf2mnn.mnn.worker.module import Refused

end_with(int(sys.argv[3]))
code, job = 0, json.loads(Path(sys.argv[2]).read_text())
try:
    importlib.import_module(sys.argv[1]).run(job)
except Refused as error:
    print(f"refused: {error}")
    code = 1
except Exception as error:
    # Without this the interpreter would run the engine's destructors, and their crash would hide the reason.
    if machine := sentence(error, Path(job.get("result", ""))):
        print(f"machine: {machine}")
    else:
        sys.excepthook(*sys.exc_info())
        print(f"bug: {error!r}")
    code = 2
sys.stdout.flush()
sys.stderr.flush()
# The engine's destructors end in a segmentation fault; everything is written, so leave without them.
os._exit(code)
