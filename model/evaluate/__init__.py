"""Every decoding mode of a checkpoint, measured on the user's prompts: `python -m model.evaluate`.

options.py, records.py  what is asked for; what passes between the parts (no torch in either)
prompts.py     rows of the user's files -> token ids, groups, accepted answers
decoding.py    prompts in one mode -> tokens, forwards, rows, seconds
agreement.py   whether tokens are greedy AR's, or differ first where AR's two best logits tie
scoring.py     whether the text holds an accepted answer
ceiling.py     the speed of light: forwards of an oracle that knows AR's text
statistics.py  decoded batches -> ratios of sums, percentiles, intervals
evaluate.py    all of it: evaluate_modes, the function to import
report.py, table.py, plot.py  modes.json, the tables, the pictures; style.py is how pictures look
command.py     what the command lines of model.evaluate and lora.evaluate share
"""
