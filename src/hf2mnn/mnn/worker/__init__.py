"""Tasks for a child process with MNN's native code; `hf2mnn.mnn.engine.run_worker` starts it.

A task is a module with `run(job)`. The job is a dictionary of paths and settings, and names the files to write. How the
task ended is in a status file (JSON), because the engine prints to stdout: `kind` ("ok", "bundle_fault", "machine" for
no disk space or memory, or "bug"), `message`, and `fault`, the kind of a BundleFault.
"""
