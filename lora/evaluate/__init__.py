"""What a draft adapter gains: linear self-speculation with it and without it, and AR, on the same prompts.

Decoding, comparison with AR and numbers are those of model/evaluate.

    gain.py          evaluate_drafter, the function to import: decoded prompts -> the gain with its interval
    gain_report.py   evaluation.json and the table in the terminal
    gain_picture.py  evaluation.png
"""
