# snakemake-storage-plugin-s3 0.3.6 caches that a folder is absent (StorageObject._is_dir), so the output of another job is
# "missing". Reading the bucket each time avoids it. Related: https://github.com/snakemake/snakemake/issues/870
if workflow.storage_settings.default_storage_provider == "s3":
    from snakemake_storage_plugin_s3 import StorageObject

    StorageObject.is_dir = lambda self: any(self.get_subkeys())
