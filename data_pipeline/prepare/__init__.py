"""Documents to token shards on all cores: `python -m data_pipeline.prepare`, or `run.prepare_source` in Python.

    inputs.py   which files, and what identifies them        plan.py     parts of work, one after another on disk
    readers.py  records of a part, in batches                   encoders.py records to token ids
    writer.py   one .bin/.idx pair                           shards.py   a part to its shards, with records
    worker.py   the process that does a part                 pool.py     the workers and their tasks
    finish.py   records to shard manifests and manifest      run.py      a source from beginning to end

Nothing is imported here: worker processes import this package and must start fast.
"""
