"""Our own dialogues, the evaluation's questions, and check.py, the tool of those who write them."""
