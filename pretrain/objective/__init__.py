"""The objective of a stage: which positions are scored (scoring) and how that makes the loss (losses)."""
