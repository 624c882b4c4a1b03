"""A page in the browser: a photograph in, every task's map beside it, values under the pointer."""
