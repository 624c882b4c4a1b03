"""The data island: sources, transforms and the loader, in NumPy and grain; it never imports jax or sgw_jax."""

if __name__ == "data_pipelines":  # by its old name, in a checkout
    from sgw_jax import moved

    moved.redirect(__name__)
