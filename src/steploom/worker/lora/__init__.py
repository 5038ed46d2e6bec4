"""LoRA files: where they are, and which are loaded."""
