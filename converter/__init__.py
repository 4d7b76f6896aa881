"""Hugging Face model in, low-rank factors out; needs PyTorch."""
