"""What a draft adapter gains: the same prompts decoded with it, without it and autoregressively.

records.py     what passes between the parts
prompts.py     rows of the user's files -> token ids
decoding.py    one prompt in three modes -> tokens, forwards, cycles, seconds, and whether they agree
statistics.py  decoded prompts -> ratios per group, gain with its interval
evaluate.py    all of it: evaluate_drafter, the function to import
report.py, table.py, plot.py  evaluation.json, the table, evaluation.png
"""
