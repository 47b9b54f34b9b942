# `logged` and `hf2mnn` are those of workflow/. The latter runs in a stage's environment, or with the Python that runs
# Snakemake, whether or not that one's environment is active.
import os
import sys
from pathlib import Path

TOOLS = [str(Path(workflow.basedir, "workflow")), str(Path(sys.executable).parent)]
os.environ.update(PATH=os.pathsep.join([*TOOLS, os.environ.get("PATH", os.defpath)]))
