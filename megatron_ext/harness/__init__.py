"""tools/evaluate.py: models of ours in lm-evaluation-harness, our tasks, reports and comparisons."""
