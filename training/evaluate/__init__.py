"""Base against adapter in numbers: start reading at measures.py. Only losses, replies and measures need torch."""
