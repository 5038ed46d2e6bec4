"""Text of diffusion language models: ``/v1/completions`` and ``/v1/chat/completions``."""
