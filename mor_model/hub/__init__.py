"""Interchange with Hugging Face transformers: export of trained networks, import of Llama checkpoints."""
