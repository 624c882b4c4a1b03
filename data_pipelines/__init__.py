"""The data island: sources, transforms and the loader, in NumPy and grain; it never imports jax or sgw_jax."""
