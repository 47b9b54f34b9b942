"""What runs inside a child process with MNN's native code; started by `hf2mnn.mnn.engine`, imported by nobody else.

Each task is a module with `run(job)`; a job is a dictionary of paths and settings, and names the files to write.
"""
