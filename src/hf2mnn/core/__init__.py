"""Foundation of all stages: stages and manifests, files, errors, progress, and untrusted input."""
