"""A trained network as files that others read: by this package, by JAX alone, by other runtimes."""
