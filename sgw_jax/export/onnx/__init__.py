"""A network as an ONNX file, by a converter of our own: its trace, primitive by primitive, as operators."""
