"""LoRA: adapters that are loaded once, and forwards whose rows have different ones."""
