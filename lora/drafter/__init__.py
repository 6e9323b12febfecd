"""The draft adapter's training: a LoRA that is on while drafting alone.

batches.py, blocks.py    examples -> DraftBatch; tokens, positions and mask of its drafted blocks
step.py, scoring.py      DraftBatch -> hidden states -> loss and acceptance, one chunk of blocks at a time
objective.py             the losses of a position and of a block; distributions.py: what they are made of
verified_objective.py    the loss of a draft that is drawn and verified
engine.py                DeepSpeed around the step: optimizer, ZeRO, its part of a checkpoint
trainer.py, build.py     the loop, and everything a run starts with
checkpoint_manifest.py   what must stay the same when a run is continued
adapter.py               attach the LoRA, count it, write it
adapter_folder.py        where it is written, and that nothing else is replaced
"""
