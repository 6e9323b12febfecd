"""Look at tokenised data: `python -m data_pipeline.inspect PATH --tokenizer DIR`."""
