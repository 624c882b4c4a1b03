"""The rooms behind `data_pipelines.scenes`: what stands where, how it is cast and shaded, its targets, its cache."""
