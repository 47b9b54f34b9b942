"""python -m hf2mnn.mnn.worker MODULE job.json"""

import importlib
import json
import os
import sys
from pathlib import Path

from hf2mnn.mnn.worker.module import Refused

code = 0
try:
    importlib.import_module(sys.argv[1]).run(json.loads(Path(sys.argv[2]).read_text()))
except Refused as error:
    print(f"refused: {error}")
    code = 1
except Exception:
    # Without this the interpreter would run the engine's destructors, and their crash would hide the reason.
    sys.excepthook(*sys.exc_info())
    print(f"bug: {sys.exc_info()[1]!r}")
    code = 2
sys.stdout.flush()
sys.stderr.flush()
# The engine's destructors end in a segmentation fault; everything is written, so leave without them.
os._exit(code)
