"""Turn documents into token shards on all cores: `python -m data_pipeline.prepare`, or `run.prepare_source` in Python.

    inputs.py   which files, and what identifies them        plan.py     parts of work; reading a part
    part.py     what all readers share                       jsonl.py, parquet.py, saved.py, tar.py, hub.py: formats
    writer.py   one .bin/.idx pair                           shards.py   a part to its shards; messages of workers
    worker.py   the process that does a part                 pool.py     the workers and their tasks
    identity.py plan.json and the lock of a folder           finish.py   complete shards to manifests
    pictured.py the pictures that records name               image_writer.py, image_sharing.py: pictures, once each
    console.py  progress bar and final table                 run.py      a source from beginning to end

Nothing is imported here: worker processes import this package and must start fast.
"""
