"""The fine-tune that makes 甄嬛: start reading at pipeline.py; run.py is its command line."""
