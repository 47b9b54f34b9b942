# snakemake-storage-plugin-s3 0.3.6 caches that a folder was not there, and does not look again when a job elsewhere has
# made it.
if workflow.storage_settings.default_storage_provider == "s3":
    from snakemake_storage_plugin_s3 import StorageObject

    StorageObject.is_dir = lambda self: any(self.get_subkeys())
