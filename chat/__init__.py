"""What serving and training share: the character, the prompt, the bases, the adapters, the engines."""
