"""Small layers without knowledge of tasks or meshes: attention, top-k attention, MLP, drop path, patches, resizing."""
