"""Pin, patches and overlay of the llama.cpp runtime (data only)."""
