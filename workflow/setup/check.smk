# Checks before Snakemake reads config.yaml: it takes the last of duplicate keys, and names no line of an error.
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from hf2mnn.config.plan import read_yaml
from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.verify import damaged_stages, refuse_former_layout

try:
    for path in [Path("config.yaml"), *workflow.overwrite_configfiles]:
        if path.is_file() and path.suffix != ".json":
            read_yaml("config", path)
    refuse_former_layout(Path("results"))
except Hf2mnnError as error:
    raise WorkflowError(str(error)) from None

for message in damaged_stages(Path("results")) if workflow.is_main_process else []:
    logger.warning(message)
