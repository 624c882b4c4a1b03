"""The procedural rooms behind `data_pipelines.scenes`: layout (what stands where), ray casting, shading and exact targets."""
