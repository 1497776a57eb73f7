"""The fine-tune that makes 甄嬛: start reading at run.py."""
