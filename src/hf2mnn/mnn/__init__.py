"""Writing and running what MNN reads: its tokenizer file, its graphs, its bundle."""
