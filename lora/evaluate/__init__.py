"""What a draft adapter gains: linear self-speculation with it, without it, and AR, on the same prompts.

Decoding, comparison with AR and numbers are those of model/evaluate.

statistics.py  decoded prompts -> the gain with its interval
evaluate.py    evaluate_drafter, the function to import
report.py, table.py, plot.py  evaluation.json, the table, evaluation.png
"""
